"""The Triton kernels in Triton's interpreter: the bodies of `test_ops.py` on few, small inputs.

Run by `test_triton.py` in a process of its own, with TRITON_INTERPRET=1 and
ORTHONORM_BACKEND=triton, where every op of the package on CPU tensors is a Triton kernel,
interpreted. Blocks are small there (`kernels/configs/*.json`, "cpu"), so that matrices of 40 rows
have tails, corners and several tiles.
"""

from __future__ import annotations

from typing import Any

import orthonorm
import pytest
import test_amp
import test_coded_steps
import test_ops
import test_rounding
import test_state_dtypes
import torch
import triton
import triton.language as tl
from kernel_bodies import bodies
from orthonorm._library import LOADED, OPS
from orthonorm.bench.cases import CASES, Case
from orthonorm.bench.inputs import Inputs, copied
from orthonorm.bench.makers import KELLER
from orthonorm.kernels import product
from test_ops import Shapes, check_numbers, first_member, made, run
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterOptions

# `test_triton.py` runs this file in a process of its own; elsewhere it would test other kernels.
assert LOADED.backend == "triton", "run tests/test_triton.py instead"

# gram_polynomial has a test of its own: in float32 it is other words, tested as such, and slow here
SERVED = tuple(CASES[name] for name, _ in LOADED.served if name != "gram_polynomial")
EACH = pytest.mark.parametrize("case", SERVED, ids=lambda c: c.name)
# ones, primes, tails, a batch, tall and wide, more than one tile in both directions
LIST = ((1, 1), (1, 7), (2, 13, 29), (41, 70))
ALONE = (((1, 1),), ((41, 70),), ((2, 2, 35, 16),))
HALF = ("gram", "symmetric_update", "apply", "small_newton_schulz", "rotate_", "rotate_back_")


def calls(case: Case) -> tuple[Shapes, ...]:
    return (LIST,) if case.takes_list else ALONE


def dtypes(case: Case) -> list[str]:
    return ["float32", "bfloat16", *(["float16"] if case.name in HALF else []),
            *(["mixed"] if "mixed" in case.dtypes else [])]  # fmt: skip


def test_every_leaf_op_is_served() -> None:
    assert set(LOADED.served.values()) == {"Triton"}
    leaves = {name for name, op in OPS.items() if not op.composite}
    assert {name for name, _ in LOADED.served} >= leaves


TestBodies = bodies(SERVED, dtypes, calls)


@EACH
@pytest.mark.parametrize("layout", ["transposed", "reversed", "sliced", "strided"])
def test_layout(case: Case, layout: str) -> None:
    dtype = "bfloat16" if case.name in HALF else "float32"
    check_numbers(case, ((2, 2, 19, 33),), Inputs.named(dtype, layout=layout))


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_rows_longer_than_a_program(layout: str) -> None:
    """Programs begin and end anywhere in a row."""
    shapes = ((3, 1500), (1500, 3), (2, 1024), (2, 1025))
    check_numbers(CASES["muon_prologue_"], shapes, Inputs.named("float32", layout=layout))


@EACH
def test_dense_and_aligned(case: Case) -> None:
    """Sides that are multiples of 8: the wide accesses and 32-bit offsets of the fast path."""
    check_numbers(case, ((2, 40, 40), (32, 16)), Inputs.named("float32"))


@EACH
def test_float64_is_left_to_definitions_or_exact(case: Case) -> None:
    check_numbers(case, ((2, 5, 9),), Inputs.named("float64"))


def test_power_of_two() -> None:
    test_ops.test_power_of_two("small_newton_schulz", "bfloat16")


@pytest.mark.parametrize("name", ["gram", "symmetric_update"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitwise_symmetric(name: str, dtype: str) -> None:
    test_ops.test_bitwise_symmetric(name, dtype)


@EACH
def test_company(case: Case) -> None:
    """Results are the same bits alone, in a batch and in a list."""
    arguments = made(case, ((2, 40, 40), (35, 64), (1, 70), (64, 3)), Inputs.named("float32"))
    both = run(case, case.op, copied(arguments))
    alone = run(case, case.op, first_member(case, copied(arguments)))
    for name, values in alone.items():
        wanted = both[name][0]
        if wanted.dim():
            line = name.startswith("result") and wanted.dim() == 1
            wanted = wanted[:1] if line else wanted[0]
        assert torch.equal(values[0].reshape(wanted.shape), wanted), name


LONG = ((20, 150), (150, 20), (2, 20, 140), (17, 129))  # too long for one program a matrix


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ends of the products launched from here on."""
    from orthonorm.kernels import product

    kernel, found = product.product_kernel, []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*arguments: Any, **options: Any) -> None:
                found.extend(a.__name__ for a in arguments if hasattr(a, "__name__"))
                kernel[grid](*arguments, **options)

            return run

    monkeypatch.setattr(product, "product_kernel", Counted())
    return found


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_long_sides_share_launches(form: str, launches: list[str]) -> None:
    """Right, the same alone as in company, and as many launches for two matrices as for one."""
    case = CASES["newton_schulz"]
    settings = {"form": form, "precision": "float32", "restarts": [3] if form == "gram" else []}
    check_numbers(case, LONG, Inputs(), **settings)
    launches.clear()
    together = run(case, case.op, made(case, LONG[::2], Inputs(), **settings))["result"]
    count = len(launches)
    for i, result in enumerate(together):
        arguments = made(case, LONG[::2], Inputs(), **settings)
        launches.clear()
        (alone,) = run(case, case.op, {**arguments, "X": arguments["X"][i : i + 1]})["result"]
        assert torch.equal(alone, result)
        assert len(launches) == count


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_muon_writes_weights_where_products_end(
    form: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long, tall, batched and small ones; by no pass of its own over the weights."""
    from orthonorm.kernels import muon_step

    monkeypatch.setattr(muon_step, "decayed_update_", None)
    case = CASES["muon_step_"]
    settings = {"form": form, "precision": "float16", "restarts": [1] if form == "gram" else []}
    settings |= {"factors": [0.5, 2.0, 3.0], "coefficients": KELLER[:6]}
    shapes = ((20, 140), (2, 150, 20), (9, 30) if form == "direct" else (20, 129))
    layout = "contiguous" if form == "direct" else "transposed"
    check_numbers(case, shapes, Inputs.named("float32", layout=layout), **settings)
    assert "update" in launches


def test_flags_of_the_scaler() -> None:
    test_amp.check_flags()


def test_halves() -> None:
    test_amp.check_halves(emulated=True)


# wide, tall and batched, in several tiles; small
STEP = ((20, 140), (2, 150, 20), (9, 30))
ONCE = {"form": "direct", "precision": "float16", "coefficients": KELLER[:3]}


def test_normuon_adds_squares_where_products_end(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By no pass of its own over the polar factors; the same alone and in company."""
    from orthonorm.kernels import lines

    monkeypatch.setattr(lines, "moments_kernel", None)
    case = CASES["normuon_step_"]
    check_numbers(case, STEP, Inputs(), **ONCE, factors=[0.5, 2.0, 3.0])
    assert {"row_squares", "column_squares"} <= set(launches)
    together = made(case, STEP, Inputs(), **ONCE)
    lists = ("params", "grads", "momentum_buffers", "row_moments", "factors")
    alone = [{**together, **{k: together[k][i : i + 1] for k in lists}} for i in range(len(STEP))]
    alone = [run(case, case.op, copied(arguments)) for arguments in alone]
    for name, values in run(case, case.op, together).items():
        assert all(torch.equal(one[name][0], v) for one, v in zip(alone, values, strict=True)), name


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_muon_rounds_where_products_end(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits that a pass of its own over the polar factors would write."""
    from orthonorm.kernels import muon_step

    case = CASES["muon_step_"]
    inputs = Inputs(torch.bfloat16, torch.float32, layout=layout)
    arguments = made(case, STEP, inputs, **ONCE, rounding=torch.tensor(7))
    want = run(case, case.op.definition, copied(arguments))["params"]
    monkeypatch.setattr(muon_step, "decayed_update_", None)
    got = run(case, case.op, copied(arguments))["params"]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    nearest = run(case, case.op, arguments | {"rounding": None})["params"]
    assert not any(torch.equal(a, b) for a, b in zip(got, nearest, strict=True))


def test_muon_heeds_the_scaler_where_products_end(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is divided out; where an infinity was found, all is left as it was, to the bit."""
    from orthonorm.kernels import muon_step

    monkeypatch.setattr(muon_step, "decayed_update_", None)
    case = CASES["muon_step_"]
    arguments = made(case, ((20, 140), (9, 30)), Inputs(), **ONCE)
    plain = run(case, case.op, copied(arguments))
    scaled = copied(arguments)
    for g in scaled["grads"]:
        g.mul_(4)
    flags = {"grad_scale": torch.tensor([4.0]), "found_inf": torch.zeros(1)}
    assert "update" in launches
    for found in (0.0, 2.0):
        flags["found_inf"].fill_(found)
        got = run(case, case.op, copied(scaled) | flags)
        for name in ("params", "momentum_buffers"):
            want = arguments[name] if found else plain[name]
            assert all(torch.equal(a, b) for a, b in zip(got[name], want, strict=True))
        scaled["grads"][0][3, 5] = float("inf")


def test_stochastic_rounding() -> None:
    test_rounding.check_same_bits(OPS["decayed_update_"])


def test_conda_takes_two_launches(launches: list[str]) -> None:
    case = CASES["conda_step_"]
    run(case, case.op, made(case, ((40, 70), (70, 40), (2, 9, 33)), Inputs.named("bfloat16")))
    assert launches == ["adam"] * 2 + ["update"] * 2  # a tall one is multiplied from the other side


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gram_polynomial_of_small_matrices(dtype: str) -> None:
    """A program each, in registers or by tiles: right, symmetric, alone as in a batch."""
    case = CASES["gram_polynomial"]
    for variant in ({}, *case.variants):
        check_numbers(case, ((2, 19, 33),), Inputs.named(dtype), **variant)
    check_numbers(case, ((64, 70),), Inputs.named(dtype, layout="strided"))
    two = KELLER[:6]
    check_numbers(case, ((72, 80),), Inputs.named(dtype, layout="strided"), coefficients=two)
    check_numbers(case, ((65, 70),), Inputs.named(dtype), **case.variants[0])
    for shape in ((3, 37, 40), (2, 70, 80)):
        arguments = made(case, (shape,), Inputs.named(dtype), coefficients=two)
        Q = case.op(**arguments)
        assert torch.equal(Q, Q.mT)
        assert torch.equal(case.op(arguments["R"][1], two), Q[1])
        assert case.op(arguments["R"][:0], two).shape == (0, *Q.shape[1:])


@pytest.mark.parametrize("op", ["symmetric", "product"])
def test_tuning_launches_what_it_is_given(op: str) -> None:
    from orthonorm.bench.tune import launcher
    from orthonorm.kernels import configs

    record = configs.Config(32, 32, 32, 4, 1)
    first, second = (launcher(op, 40, torch.float32, "cpu")(record) for _ in range(2))
    assert first.isfinite().all() and not torch.equal(first, second)
    assert op == "product" or torch.equal(first, first.mT)


def test_long_rows_in_pieces() -> None:
    """Of Gram matrices with few tiles; the same alone as beside others."""
    from orthonorm.kernels.gram import grams, pieces

    assert pieces(5, 8200) == 4 and pieces(512, 8192) == 2 and pieces(513, 10**6) == 1
    X = [torch.randn(2, 5, 8200), torch.randn(8195, 3).mT, torch.randn(4, 30)]
    out = [x.new_empty(*x.shape[:-1], x.shape[-2]) for x in X]
    grams(X, out)
    for x, y in zip(X, out, strict=True):
        want = x.double() @ x.double().mT
        plain = (x @ x.mT - want).square().mean().sqrt()
        assert (y - want).square().mean().sqrt() <= 2 * plain + 4e-7 * want.square().mean().sqrt()
        assert torch.equal(y, y.mT)
        assert torch.equal(orthonorm.ops.gram(x), y)


@pytest.mark.parametrize(("kind", "signed"), [("ties", True), ("ties", False), ("nan", False)])
def test_codes_are_the_definitions(kind: str, signed: bool) -> None:
    test_state_dtypes.test_kernels_codes_are_the_definitions(kind, signed)


def test_fused_codes_are_those_of_three_ops() -> None:
    test_coded_steps.check_kernels()


def test_tables_are_written_exactly() -> None:
    """The way a table takes into a CUDA graph."""
    from orthonorm.kernels import tables

    values = (1, -(2**63), 2**63 - 1, 7, 7, 7, tables.bits(-0.1), 0, 0, 7)
    assert tuple(tables.written(values, torch.device("cpu")).tolist()) == values


def far(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Numbers whose offsets leave 32 bits; the memory between them is never touched."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    X = torch.empty(elements, dtype=torch.float16).as_strided(shape, strides)
    return X.copy_(torch.randn(shape))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 5), (2**30 + 8, 1)), ((2, 8, 8), (2**31 + 16, 8, 1)), ((5, 3), (1, 2**30 + 8))],
)
def test_offsets_beyond_32_bits(
    shape: tuple[int, ...], strides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter.interpreter_builder, "options", InterpreterOptions())
    X = far(shape, strides)
    near = X.contiguous()
    for f in (orthonorm.ops.gram, orthonorm.ops.row_normalize, orthonorm.ops.column_normalize):
        assert torch.equal(f(X), f(near))
    norms = orthonorm.ops.magnitude([near])
    assert torch.equal(orthonorm.ops.magnitude([X]), norms)
    wanted = orthonorm.ops.divide_each(near, norms, torch.float32)
    assert torch.equal(orthonorm.ops.divide_each(X, norms, torch.float32), wanted)


def test_overlapping_rows() -> None:
    """Of a vector unfolded, where both strides are 1: rows begin at every element."""
    X = torch.randn(63).unfold(0, 8, 1)
    for f in (orthonorm.ops.gram, orthonorm.ops.row_normalize, orthonorm.ops.column_normalize):
        assert torch.equal(f(X), f(X.contiguous()))


@pytest.mark.parametrize("shape", [(2048, 4096), (3, 2048, 2048)])
def test_large_matrices_are_aligned(shape: tuple[int, ...]) -> None:
    """Tensors, and places of a workspace: else they are read by single elements."""
    from orthonorm.kernels import tables

    X = torch.empty(shape, dtype=torch.bfloat16)
    for ((found,),) in (tables.views(X), tables.views(X.mT)):
        own = tables.dense(X.dtype, found.batch, found.rows, found.columns, found.fields[0])
        assert found.aligned and own.aligned


@triton.jit
def half_kernel(x, y, product, total, rounded, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(product + at, tl.dot(a, b))
    tl.store(total + at, a + b)
    tl.store(rounded + at, tl.load(product + at).to(tl.bfloat16))


@triton.jit
def nearest_kernel(x, N: tl.constexpr):
    at = x + tl.arange(0, N)
    tl.store(at, product.nearest(tl.load(at)))


def test_rounding_to_tf32() -> None:
    """To 10 bits behind the point, as the same numbers do in float16, but ties go away from 0."""
    x = torch.rand(4096) + 1
    x = torch.cat([x, -x])
    got = x.clone()
    nearest_kernel[(1,)](got, x.numel())
    tie = (x.view(torch.int32) & 0x1FFF) == 0x1000
    assert torch.equal(got[~tie], x.half().float()[~tie])
    odd = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 3 * 2**-11, 0.0, -0.0, torch.inf, -torch.inf])
    odd = torch.cat([odd, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    nearest_kernel[(1,)](odd, odd.numel())
    wanted = [1 + 2**-10, -1 - 2**-10, 1 + 2**-9, 0.0, -0.0, torch.inf, -torch.inf, torch.nan]
    torch.testing.assert_close(odd, torch.tensor(wanted), rtol=0, atol=0, equal_nan=True)


@triton.jit
def sum_kernel(x, N: tl.constexpr):
    tl.store(x, tl.sum(tl.load(x + tl.arange(0, N)), axis=0))


def test_repairs_of_the_interpreter() -> None:
    """bfloat16 products, sums and roundings as torch has them, which the tests above rest on."""
    x, y = torch.randn(2, 16, 16).bfloat16().unbind()
    product = torch.empty(16, 16)
    total, rounded = (torch.empty(16, 16, dtype=torch.bfloat16) for _ in range(2))
    half_kernel[(1,)](x, y, product, total, rounded, 16)
    torch.testing.assert_close(product, x.float() @ y.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(total, x + y)
    assert torch.equal(rounded, product.bfloat16())
    with pytest.raises(Exception, match="sum of bfloat16"):
        sum_kernel[(1,)](x, 16)
