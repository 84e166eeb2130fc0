"""The CUDA kernels on the CPU: the bodies of `test_ops.py` on small inputs and awkward layouts.

Run by `test_cuda_on_cpu.py` in a process of its own, where `csrc/cuda` fills the CPU keys.
"""

from __future__ import annotations

import os

import pytest
import test_amp
import test_rounding
import torch
from cuda_on_cpu import library
from guards import check_bands
from kernel_bodies import bodies
from orthonorm import ops
from orthonorm.__main__ import serving
from orthonorm._library import LOADED, OPS, has_kernel
from orthonorm.bench.cases import CASES, Case, tensors
from orthonorm.bench.inputs import Inputs, copied
from test_ops import Shapes, by_dtype, check_numbers, first_member, fits, made, run

assert os.environ.get("ORTHONORM_BACKEND") == "reference", "run tests/test_cuda_on_cpu.py instead"
torch.ops.load_library(library())
LOADED.fill("CPU", triton=False)  # what serves a part of its inputs leaves the rest to references
PARTS = ("gram_polynomial", "direct_polynomial", "small_newton_schulz")
# direct_polynomial runs in clusters only: `emulated_clusters.py`
SERVED = tuple(CASES[n] for n in CASES if has_kernel(n, "CPU") and n != "direct_polynomial")
EACH = pytest.mark.parametrize("case", SERVED, ids=lambda c: c.name)
# ones, primes, tails, a batch, tall and wide, more than one tile
LIST = ((1, 1), (1, 7), (2, 13, 29), (41, 70), (97, 128), (64, 64))
ALONE = (((1, 1),), ((41, 70),), ((2, 2, 35, 16),), ((97, 128),))


def calls(case: Case) -> tuple[Shapes, ...]:
    return (LIST,) if case.takes_list else ALONE


def test_only_these_kernels_serve() -> None:
    assert {name for name, _ in LOADED.served} == set(PARTS)
    assert serving("gram_polynomial", "CPU") == (
        "CUDA",
        "kernel loaded for sides up to 128, on sm_90 up to 256, in float16 or bfloat16; "
        "else reference",
    )
    assert {c.name for c in SERVED} <= set(OPS)


def is_part(case: Case) -> bool:
    """Whether float32 and float64 are the reference's, which would be compared with itself."""
    return case.name in PARTS


def dtypes(case: Case) -> list[str]:
    return ["float16", "bfloat16"] if is_part(case) else ["float32", "bfloat16"]


TestBodies = bodies([c for c in SERVED if not is_part(c)], by_dtype, calls)
TestParts = bodies([c for c in SERVED if is_part(c)], dtypes, calls, usual="bfloat16")
EACH_DTYPE = pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(c, d, id=f"{c.name}-{d}") for c in SERVED for d in dtypes(c)]
)


@EACH_DTYPE
@pytest.mark.parametrize("layout", ["transposed", "reversed", "sliced", "strided"])
def test_layout(case: Case, layout: str, dtype: str) -> None:
    check_numbers(case, ((2, 2, 19, 33),), Inputs.named(dtype, layout=layout))
    check_numbers(case, ((3, 64, 64),), Inputs.named(dtype, layout=layout))


@EACH_DTYPE
def test_bands(case: Case, dtype: str) -> None:
    for shapes in calls(case):
        check_bands(case, shapes, Inputs.named(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_matrices_of_every_size(dtype: str) -> None:
    """A block of one and of four warps, one and two tiles each; products of whole tiles and not."""
    small, chain = (CASES[name] for name in ("small_newton_schulz", "gram_polynomial"))
    for shape in ((5, 7), (17, 33), (50, 50), (128, 64), (128, 128)):
        check_numbers(small, (shape,), Inputs.named(dtype))
    for n in (16, 33, 80):
        check_numbers(chain, ((n, n),), Inputs.named(dtype))


@pytest.mark.parametrize("shape", [(128, 3072), (700, 40)])
def test_the_chain_in_gram_form(shape: tuple[int, int]) -> None:
    case = CASES["newton_schulz"]
    check_numbers(case, (shape,), Inputs.named("float16"), form="gram", precision="float16")


def test_the_rest_of_a_part() -> None:
    """What the library does not serve is the reference's, bit for bit; what it serves is not."""
    X, op = [torch.randn(60, 80)], ops.small_newton_schulz
    triple = [3.4445, -4.7750, 2.0315]
    for served, x, coefficients, dtype in (
        (False, X, triple, torch.float32),
        (False, [x.double() for x in X], triple, torch.float16),
        (False, X, [1.0, 0.0, 0.0] * 129, torch.float16),
        (True, X, triple * 3, torch.float16),
    ):
        got, want = (f(x, coefficients, dtype)[0] for f in (op, op.reference))
        assert torch.equal(got, want) is not served


def test_power_iteration_of_several_tiles() -> None:
    """Rows of many tiles, read either way, both orders; the first of a batch as alone."""
    case = CASES["power_iteration_"]
    for layout in ("contiguous", "transposed"):
        for order in ("u_first", "v_first"):
            inputs = Inputs.named("bfloat16", layout=layout)
            check_numbers(case, ((2, 150, 40), (40, 150)), inputs, order=order)


@EACH
def test_company(case: Case) -> None:
    """Results are the same bits alone, in a batch and in a list."""
    for shape in filter(lambda s: fits(case, s), ((2, 40, 40), (2, 141, 67))):
        inputs = Inputs.named("bfloat16" if is_part(case) else "float32")
        arguments = made(case, (shape, (35, 64), (1, 70), (64, 3)), inputs)
        both = run(case, case.op, copied(arguments))
        alone = run(case, case.op, first_member(case, copied(arguments)))
        for name, values in alone.items():
            wanted = both[name][0]
            if wanted.dim():
                line = name.startswith("result") and wanted.dim() == 1
                wanted = wanted[:1] if line else wanted[0]
            assert torch.equal(values[0].reshape(wanted.shape), wanted), name


@pytest.mark.parametrize("case", [c for c in SERVED if c.takes_list], ids=lambda c: c.name)
def test_long_lists_are_several_launches(case: Case) -> None:
    few = any(word in case.name for word in ("norm", "moment", "power", "magnitude"))
    inputs = Inputs.named("bfloat16" if is_part(case) else "float32")
    check_numbers(case, ((3, 5), (2, 2, 3)) * (60 if few else 140), inputs)


@pytest.mark.parametrize("case", [c for c in SERVED if c.takes_list], ids=lambda c: c.name)
def test_written_twice_is_refused(case: Case) -> None:
    arguments = made(case, ((4, 4), (4, 4)), Inputs.named("float32"))
    written = [n for n, v in tensors(arguments).items() if n in writes(case) and len(v) == 2]
    for name in written:
        twice = {**arguments, name: [arguments[name][0]] * 2}
        with pytest.raises(RuntimeError, match=f"{case.name}: {name}.1. is written"):
            case.op.overload(**twice)


def test_shared_memory_is_refused() -> None:
    """Of two tensors that are written; columns of one matrix share none."""
    memory, u = torch.randn(24), torch.randn(4, 4)
    numbers = (torch.tensor(1.0), torch.tensor(0.0))
    parts = [memory[8:].view(4, 4), memory[:16].view(4, 4)]
    before = memory.clone()
    rule = r"params.0. is written and must not share memory with params.1., which is written too"
    with pytest.raises(RuntimeError, match=f"decayed_update_: {rule}"):
        ops.decayed_update_(parts, [u, u], *numbers, [1.0, 1.0])
    assert torch.equal(memory, before)
    columns = list(torch.randn(4, 8).split(4, dim=1))
    wanted = [c - u for c in columns]
    ops.decayed_update_(columns, [u, u], *numbers, [1.0, 1.0])
    assert all(torch.equal(c, w) for c, w in zip(columns, wanted, strict=True))


@pytest.mark.parametrize("case", [c for c in SERVED if c.takes_list], ids=lambda c: c.name)
def test_empty_members(case: Case) -> None:
    """Matrices without elements among others."""
    inputs = Inputs.named("bfloat16" if is_part(case) else "float32")
    check_numbers(case, ((0, 5), (3, 4), (2, 0, 3), (0, 2, 2), (5, 7), (4, 0)), inputs)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 5), (2**30 + 8, 1)), ((2, 8, 8), (2**31 + 16, 8, 1)), ((5, 3), (1, 2**30 + 8))],
)
def test_offsets_beyond_32_bits(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """The memory between the elements is never touched."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    X = torch.empty(elements, dtype=torch.float16).as_strided(shape, strides)
    X.copy_(torch.randn(shape))
    near = X.contiguous()
    for f in (ops.row_normalize, ops.column_normalize):
        assert torch.equal(f(X), f(near))
    norms = ops.magnitude([near])
    assert torch.equal(ops.magnitude([X]), norms)
    wanted = ops.divide_each(near, norms, torch.float32)
    assert torch.equal(ops.divide_each(X, norms, torch.float32), wanted)
    cubic = [1.5, -0.5, 0.0]
    assert torch.equal(ops.direct_polynomial(X, cubic), ops.direct_polynomial(near, cubic))
    half = [ops.small_newton_schulz([x], cubic, torch.float16)[0] for x in (X, near)]
    assert torch.equal(*half)


def test_flags_of_the_scaler() -> None:
    test_amp.check_flags()


def test_halves() -> None:
    test_amp.check_halves(emulated=True)


def test_stochastic_rounding() -> None:
    test_rounding.check_same_bits(ops.decayed_update_)


def test_errors_of_a_launch_name_op_and_shapes() -> None:
    """More tiles or matrices than are counted, and what CUDA says of too many blocks."""
    X = torch.zeros(1, 1).expand(2**31, 2**20)
    with pytest.raises(RuntimeError, match=r"magnitude: .*, on X of shapes .2147483648, 1048576."):
        ops.magnitude([X])
    one, coefficients = torch.zeros(1, 1, 1, dtype=torch.float16), [1.5, -0.5, 0.0]
    rule = r"more matrices than a launch can count, on X of shapes .2147483648, 1, 1."
    with pytest.raises(RuntimeError, match=f"small_newton_schulz: {rule}"):
        ops.small_newton_schulz([one.expand(2**31, 1, 1)], coefficients, torch.float16)
    rule = r"invalid configuration argument, on X of shapes .536870912, 1, 1."
    with pytest.raises(RuntimeError, match=f"direct_polynomial: {rule}"):
        ops.direct_polynomial(one.expand(2**29, 1, 1), coefficients)


def writes(case: Case) -> set[str]:
    schema = case.op.overload._schema
    return {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
