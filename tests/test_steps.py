"""The passes over lists of tensors: rotated_adam_, magnitude, muon_prologue_, decayed_update_,
adamw_step_. Errors are measured against the references in float64 (DESIGN.md)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from orthonorm import ops
from orthonorm._library import OPS, Op
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Arguments = dict[str, Any]
Layout = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """References of small tensors would mostly wait for threads; results do not depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The tensor lists of each op, the other arguments of a list of n, and its variants.
LISTS = {
    "rotated_adam_": ("exp_avg", "exp_avg_sq", "X"),
    "magnitude": ("X",),
    "muon_prologue_": ("grads", "momentum_buffers", "updates"),
    "decayed_update_": ("params", "updates"),
    "adamw_step_": ("params", "grads", "exp_avg", "exp_avg_sq"),
}
MATRICES = ("magnitude", "muon_prologue_")
VARIANTS: dict[str, tuple[Arguments, ...]] = {
    "rotated_adam_": ({}, {"eps": 0.0}, {"scales": None}),
    "magnitude": ({},),
    "muon_prologue_": ({}, {"nesterov": False}, {"momentum": torch.tensor(0.5)}),
    "decayed_update_": ({}, {"weight_decay": 0.0}),
    "adamw_step_": (
        {},
        {"decay_first": False, "correct_eps": False},
        {"weight_decay": 0.0, "eps": 0.0, "lr": torch.tensor(0.01)},
    ),
}
ROWS = [(name, i) for name, variants in VARIANTS.items() for i in range(len(variants))]
TENSORS = [(), (1,), (5,), (0,), (3, 0), (129, 257), (2, 3, 4, 5), (8200,), (64, 31), (1, 17)]
SHAPES = [(1, 1), (1, 17), (23, 1), (0, 4), (3, 0), (0, 2, 3), (3, 0, 5), (129, 257), (3, 64, 31)]
MIXES = {
    "float32": (F32,) * 4,
    "float64": (F64,) * 4,
    "bfloat16": (BF16,) * 4,
    "float16": (F16,) * 4,
    "half-weights": (BF16, BF16, F32, F32),
    "half-states": (F32, F32, BF16, F16),
    "wide-states": (F16, F32, F64, F64),
    "wide-weights": (F64, BF16, F32, BF16),
}


def shapes_of(name: str) -> Sequence[tuple[int, ...]]:
    return SHAPES if name in MATRICES else TENSORS + SHAPES


def make(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype] = MIXES["float32"],
    layouts: Sequence[Layout] = (),
    variant: int = 0,
    seed: int = 0,
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    made: Arguments = {}
    for k, label in enumerate(LISTS[name]):
        made[label] = []
        for shape in shapes:
            x = torch.randn(shape, generator=generator, dtype=F64)
            x = x.square() + 0.01 if label == "exp_avg_sq" else x
            x = x.to(dtypes[k])
            made[label].append(layouts[k % len(layouts)](x) if layouts else x)
    n = len(shapes)
    if name == "rotated_adam_":
        made |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        made["scales"] = torch.linspace(0.3, 2.0, n, dtype=F64)
    if name == "muon_prologue_":
        made["momentum"] = torch.tensor(0.95, dtype=F64)
    if name == "decayed_update_":
        made |= {"lr": torch.tensor(0.02, dtype=F64), "weight_decay": 0.3}
        made["factors"] = [0.1 + 0.3 * i for i in range(n)]
    if name == "adamw_step_":
        made["steps"] = [torch.tensor(float(i), dtype=(F32, F64)[i % 2]) for i in range(n)]
        made |= {"lr": torch.tensor(0.01, dtype=F64), "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        made["weight_decay"] = 0.1
    return made | VARIANTS[name][variant]


def mapped(arguments: Arguments, f: Callable[[Tensor], Tensor]) -> Arguments:
    return {
        key: [f(t) for t in value]
        if isinstance(value, list) and value and isinstance(value[0], Tensor)
        else value
        for key, value in arguments.items()
    }


def copied(t: Tensor) -> Tensor:
    """The same values at the same strides, in memory of its own."""
    if t.numel() == 0:
        return t.clone()
    length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((length,), (1,)).clone().as_strided(t.shape, t.stride())


def mutated(name: str) -> list[str]:
    arguments = OPS[name].overload._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def run(call: Callable[..., Any], name: str, arguments: Arguments) -> dict[str, list[Tensor]]:
    """Everything the call wrote or returned, on copies of the arguments; nothing else changed."""
    given = mapped(arguments, copied)
    result = call(**given)
    out = {label: given[label] for label in mutated(name)}
    for label in set(LISTS[name]) - set(out):
        for before, after in zip(arguments[label], given[label], strict=True):
            assert same(before, after), f"{name} changed {label}"
    if result is not None:
        out["norms"] = [result]
    return out


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        and torch.equal(a.isnan(), b.isnan())
    )


def op(name: str) -> Op[..., Any]:
    return OPS[name]


def distance(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    total = sum(float((a.double() - b).square().sum()) for a, b in zip(values, exact, strict=True))
    return math.sqrt(total)


def exact_norms(name: str, arguments: Arguments, exact: dict[str, list[Tensor]]) -> list[Tensor]:
    """|X|_F of every matrix, correctly rounded but for the root."""
    matrices = exact["updates"] if name == "muon_prologue_" else arguments["X"]
    flat = [
        m for x in matrices for m in x.reshape(math.prod(x.shape[:-2]), math.prod(x.shape[-2:]))
    ]
    squares = (math.fsum(v * v for v in m.reshape(-1).tolist()) for m in flat)
    return [torch.tensor([math.sqrt(s) for s in squares], dtype=F64)]


def errors(
    call: Callable[..., Any], name: str, arguments: Arguments, exact: dict[str, list[Tensor]]
) -> dict[str, float]:
    return {k: distance(v, exact[k]) for k, v in run(call, name, arguments).items()}


def in_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype == F64 else t


def check_errors(name: str, arguments: Arguments) -> None:
    """err(kernel) <= 2 err(reference) for everything written, over the list.

    Where arithmetic is in float64, like the oracle, 2 err(reference) is what a float32 list would
    be allowed, by the ratio of the two roundings, for kernel and oracle each.
    """
    doubles = mapped(arguments, Tensor.double)
    exact = run(op(name).reference, name, doubles)
    if "norms" in exact:
        exact["norms"] = exact_norms(name, doubles, exact)
    kernel = errors(op(name), name, arguments, exact)
    allowed = errors(op(name).reference, name, arguments, exact)
    floats = mapped(arguments, in_float32)
    if any(t.dtype == F64 for label in LISTS[name] for t in arguments[label]):
        rounded = run(op(name).reference, name, mapped(floats, Tensor.double))
        narrow = errors(op(name).reference, name, floats, rounded)
        ratio = torch.finfo(F64).eps / torch.finfo(F32).eps
        allowed = {k: max(e, 2 * ratio * narrow[k]) for k, e in allowed.items()}
    unit = torch.finfo(F64).eps * float(exact["norms"][0].norm()) if "norms" in exact else 0.0
    for label, error in kernel.items():
        slack = unit if label == "norms" else 0.0  # of the result itself
        limit = 2 * allowed[label] + slack
        assert error <= limit, f"{name} {label}: {error} > {limit}"


# ---- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("name", "variant"), ROWS)
def test_errors_against_float64(name: str, variant: int, mix: str) -> None:
    check_errors(name, make(name, shapes_of(name), MIXES[mix], variant=variant))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", LISTS)
def test_errors_of_many_small_tensors(name: str, mix: str) -> None:
    """Remainders of vector loops, which a large tensor would hide."""
    check_errors(name, make(name, [(1, n) for n in range(1, 100)], MIXES[mix]))


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() >= 2 else t


def every_second(t: Tensor) -> Tensor:
    """Columns of a wider tensor, two apart."""
    if t.dim() == 0:
        return t
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)
    view = wide[..., 1 : 1 + 2 * t.shape[-1] : 2]
    return view.copy_(t)


def part_of_rows(t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
    return wide[..., 2 : 2 + t.shape[-1]].copy_(t)


def outermost_last(t: Tensor) -> Tensor:
    """Dimensions reversed in memory: batch strides smaller than matrix strides."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order) if t.dim() else t


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "transposed": (transposed,),
    "second-transposed": (torch.clone, transposed, torch.clone, transposed),
    "strided": (every_second,),
    "sliced": (part_of_rows,),
    "reversed": (outermost_last,),
    "all": (part_of_rows, transposed, every_second, outermost_last),
}


@pytest.mark.parametrize("mix", ["float32", "half-weights", "wide-states"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LISTS)
def test_layouts(name: str, layout: str, mix: str) -> None:
    shapes = [*shapes_of(name), (2, 3, 5, 7), (300, 130)]
    laid = run(op(name), name, make(name, shapes, MIXES[mix], LAYOUTS[layout]))
    plain = run(op(name), name, make(name, shapes, MIXES[mix]))
    for label, values in laid.items():
        if label == "norms":  # sums run in memory order
            torch.testing.assert_close(values, plain[label], rtol=1e-14, atol=0.0)
        else:
            assert all(map(same, values, plain[label])), label


def test_memory_between_strides_is_left_alone() -> None:
    wide = torch.full((64, 50), 5.0)
    w, u = wide[::2, 1:40:3], torch.randn(32, 13)
    ops.decayed_update_([w], [u], torch.tensor(1.0), 1.0, [1.0])
    assert torch.equal(wide[::2, 1:40:3], -u)
    wide[::2, 1:40:3] = 5.0
    assert torch.equal(wide, torch.full((64, 50), 5.0))


@pytest.mark.parametrize("name", ["adamw_step_", "decayed_update_"])
def test_expanded_gradients_are_read(name: str) -> None:
    arguments = make(name, [(40, 30)])
    label = LISTS[name][1]
    arguments[label] = [torch.randn(30).expand(40, 30)]
    dense = arguments | {label: [arguments[label][0].clone()]}
    got, wanted = (run(op(name), name, a)["params"][0] for a in (arguments, dense))
    assert torch.equal(got, wanted)


def test_parameters_that_require_grad_and_views_of_one_storage() -> None:
    flat = torch.randn(1000)
    views = [flat[:400].view(20, 20), flat[400:].view(30, 20)]
    params = [torch.nn.Parameter(v) for v in views]
    updates = [torch.ones_like(v) for v in views]
    wanted = flat - 0.5
    with torch.no_grad():
        ops.decayed_update_(params, updates, torch.tensor(0.5), 0.0, [1.0, 1.0])
    assert torch.equal(flat, wanted)


# ---- the same alone, in lists and on any number of threads ---------------------------------------
BIG = [(301, 257), (5, 7), (3, 64, 80), (1, 70001), (0, 3), (16, 1024)]


@pytest.mark.parametrize("mix", ["float32", "half-weights", "float64"])
@pytest.mark.parametrize("name", LISTS)
def test_lists_equal_singles(name: str, mix: str) -> None:
    arguments = make(name, BIG, MIXES[mix])
    together = run(op(name), name, arguments)
    norms = []
    for i in range(len(BIG)):
        single = {
            key: value[i : i + 1] if isinstance(value, list) or key == "scales" else value
            for key, value in arguments.items()
        }
        alone = run(op(name), name, single)
        norms.extend(alone.pop("norms", []))
        for label, values in alone.items():
            assert same(values[0], together[label][i]), f"{label}[{i}]"
    if norms:
        assert torch.equal(torch.cat(norms), together["norms"][0])


@pytest.mark.parametrize("mix", ["float32", "half-states", "float64"])
@pytest.mark.parametrize("name", LISTS)
def test_any_number_of_threads(name: str, mix: str) -> None:
    arguments = make(name, BIG, MIXES[mix])
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(op(name), name, arguments))
    for other in results[1:]:
        for label, values in results[0].items():
            assert all(same(a, b) for a, b in zip(values, other[label], strict=True)), label


@pytest.mark.parametrize("name", LISTS)
def test_empty_lists(name: str) -> None:
    result = op(name)(**make(name, []))
    if result is not None:
        assert (result.shape, result.dtype) == ((0,), F64)


# ---- norms ---------------------------------------------------------------------------------------
def norms_of(name: str, X: Tensor) -> Tensor:
    """The norm as `magnitude` gives it, or muon_prologue_ with momentum 0, where U is G."""
    if name == "magnitude":
        return ops.magnitude([X])
    buffers, updates = torch.zeros_like(X), torch.empty_like(X)
    norms = ops.muon_prologue_([X], [buffers], [updates], torch.tensor(0.0))
    if bool(X.isfinite().all()):  # 0 * inf is not 0
        assert same(updates, X)
    return norms


RANGES = {F32: (-149, 120), BF16: (-133, 120), F16: (-24, 8), F64: (-1074, 1012)}


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("name", MATRICES)
def test_a_power_of_two_moves_the_norm_by_itself(name: str, dtype: torch.dtype) -> None:
    low, high = RANGES[dtype]
    # Small integers: exact at every scale, denormals included.
    X = torch.randint(-15, 16, (130, 190), generator=torch.Generator().manual_seed(0)).double()
    norm = norms_of(name, X.to(dtype))
    for k in [*range(low, high, 37), low, high]:
        scaled = torch.ldexp(X, torch.tensor(k)).to(dtype)
        assert torch.equal(norms_of(name, scaled), torch.ldexp(norm, torch.tensor(k))), k


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("name", MATRICES)
def test_scales_within_one_matrix(name: str, dtype: torch.dtype) -> None:
    """Blocks of very different sizes, the largest first, last and alone."""
    small, large = (1e-40, 1e36) if dtype != F64 else (1e-310, 1e300)
    for rows in ([0], [99], [0, 50], []):
        X = torch.full((100, 300), small, dtype=dtype)
        X[rows] = large
        exact = math.hypot(*[float(X[i, 0]) * math.sqrt(300) for i in range(100)])
        assert norms_of(name, X).item() == pytest.approx(exact, rel=1e-15)


@pytest.mark.parametrize("dtype", MIXES["half-states"][1:] + (F64,))
@pytest.mark.parametrize("name", MATRICES)
def test_zeros_and_non_finite_entries_stay_in_their_matrix(name: str, dtype: torch.dtype) -> None:
    X = torch.ones(6, 30, 40, dtype=dtype)
    X[1] = 0
    X[2, 29, 39] = math.inf
    X[3, 0, 0] = math.nan
    X[4, 3, 3] = -math.inf
    norms = norms_of(name, X).tolist()
    assert norms[0] == norms[5] == math.sqrt(1200)
    assert norms[1] == 0.0
    assert not any(math.isfinite(n) for n in norms[2:5])


def test_updates_are_measured_before_they_are_rounded() -> None:
    G, B = torch.randn(50, 60), torch.randn(50, 60)
    norms = {}
    for dtype in (F32, BF16, F16):
        updates = torch.empty(50, 60, dtype=dtype)
        norms[dtype] = ops.muon_prologue_([G], [B.clone()], [updates], torch.tensor(0.9)).item()
    assert norms[BF16] == norms[F16] == norms[F32]


def test_muon_prologue_overwrites_whatever_updates_held() -> None:
    updates = torch.full((50, 60), math.nan, dtype=BF16)
    ops.muon_prologue_([torch.ones(50, 60)], [torch.zeros(50, 60)], [updates], torch.tensor(0.5))
    assert torch.equal(updates, torch.full((50, 60), 0.75, dtype=BF16))


# ---- edges of the arithmetic ---------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e36, 0.0])
@pytest.mark.parametrize("name", LISTS)
def test_scales_follow_the_reference(name: str, scale: float) -> None:
    """Overflow where the reference does; else twice its error, or a denormal's rounding."""
    arguments = mapped(make(name, [(33, 65)]), lambda t: t * scale if t.dim() else t)
    exact = run(op(name).reference, name, mapped(arguments, Tensor.double))
    kernel = run(op(name), name, arguments)
    reference = run(op(name).reference, name, arguments)
    for label in reference:
        a, b, c = kernel[label][0], reference[label][0], exact[label][0]
        finite = b.isfinite()
        assert same(finite, a.isfinite()), label
        error, allowed = (distance([v[finite]], [c[finite]]) for v in (a, b))
        unit = 1e-14 * float(c.norm()) if label == "norms" else math.sqrt(b.numel()) * 2.0**-149
        assert error <= 2 * allowed + unit, label


def test_zero_over_zero_is_zero() -> None:
    M, V, X = (torch.zeros(9, 40) for _ in range(3))
    ops.rotated_adam_([M], [V], [X], 0.9, 0.99, 0.0)
    assert torch.equal(X, torch.zeros(9, 40))
    W, G, step = torch.ones(9, 40), torch.zeros(9, 40), torch.zeros(())
    ops.adamw_step_([W], [G], [M], [V], [step], torch.tensor(0.1), 0.9, 0.99, 0.0, 0.0)
    assert torch.equal(W, torch.ones(9, 40))


@pytest.mark.parametrize("name", ["rotated_adam_", "decayed_update_", "adamw_step_"])
def test_non_finite_entries_stay_where_they_are(name: str) -> None:
    arguments = make(name, [(40, 50), (7,)])
    clean = run(op(name), name, arguments)
    source = LISTS[name][2 if name == "rotated_adam_" else 1]
    arguments[source][0][3, 4], arguments[source][0][5, 6] = math.nan, math.inf
    dirty = run(op(name), name, arguments)
    for label in set(clean) - {"steps"}:
        expected = torch.ones(40, 50, dtype=torch.bool)
        expected[3, 4] = expected[5, 6] = False
        assert torch.equal(clean[label][0][expected], dirty[label][0][expected])
        assert dirty[label][0][3, 4].isnan()
        assert same(clean[label][1], dirty[label][1])


def test_float64_is_rounded_once_to_half_precision() -> None:
    """Half a unit and a bit: a float in between would drop the bit, and the tie goes to even."""
    for dtype, unit in ((BF16, 2.0**-7), (F16, 2.0**-10)):
        above = 1 + unit / 2 + 2.0**-40
        w = torch.full((3, 100), 1.0, dtype=dtype)
        u = torch.full((3, 100), 1.0 - above, dtype=F64)
        ops.decayed_update_([w], [u], torch.tensor(1.0, dtype=F64), 0.0, [1.0])
        assert torch.equal(w, torch.full((3, 100), 1 + unit, dtype=dtype))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_conversions_are_those_of_torch(dtype: torch.dtype) -> None:
    """Every 16-bit pattern read, every neighbourhood of a rounding boundary written."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros = torch.zeros(2**16)
    wide = torch.zeros(2**16)
    ops.decayed_update_([wide], [every], torch.tensor(-1.0), 0.0, [1.0])
    assert same(wide, zeros + every.float())
    between = wide.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0x1000, 0x7FFF, 0x8000])
    values = between.to(torch.int32).view(F32).reshape(-1)
    back = torch.zeros(values.shape, dtype=dtype)
    ops.decayed_update_([back], [values], torch.tensor(-1.0), 0.0, [1.0])
    assert same(back, (0.0 + values).to(dtype))


# ---- AdamW is torch's ----------------------------------------------------------------------------
def adamw_weights(dtype: torch.dtype, ours: bool, steps: int = 6, **keywords: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(33, 65), (7,), (), (20, 3, 5)]
    W = [torch.randn(s, generator=generator).to(dtype).requires_grad_(not ours) for s in shapes]
    M, V = [torch.zeros_like(w) for w in W], [torch.zeros_like(w) for w in W]
    counts = [torch.zeros(()) for _ in W]
    optimizer = None if ours else torch.optim.AdamW(W, lr=1e-2, foreach=False, **keywords)
    for _ in range(steps):
        G = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        if optimizer is None:
            beta1, beta2 = keywords["betas"]
            rate = torch.tensor(1e-2, dtype=F64)
            decay = keywords["weight_decay"]
            ops.adamw_step_(W, G, M, V, counts, rate, beta1, beta2, keywords["eps"], decay)
        else:
            for w, g in zip(W, G, strict=True):
                w.grad = g
            optimizer.step()
    if ours:
        assert all(c.item() == steps for c in counts)
    return [w.detach() for w in W]


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adamw_follows_torch(eps: float) -> None:
    keywords = {"betas": (0.9, 0.95), "eps": eps, "weight_decay": 0.1}
    exact = adamw_weights(F64, False, **keywords)
    for ours, theirs in zip(adamw_weights(F64, True, **keywords), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    error = distance(adamw_weights(F32, True, **keywords), exact)
    assert error <= 2 * distance(adamw_weights(F32, False, **keywords), exact)


def test_a_shared_step_count_advances_with_every_parameter() -> None:
    step = torch.zeros(())
    arguments = make("adamw_step_", [(3, 4)] * 3) | {"steps": [step] * 3}
    shared = mapped(arguments, copied) | {"steps": [step] * 3}
    ops.adamw_step_(**shared)
    assert step.item() == 3.0
    apart = mapped(arguments, copied) | {"steps": [torch.tensor(float(i)) for i in range(3)]}
    ops.adamw_step_(**apart)
    assert all(map(torch.equal, shared["params"], apart["params"]))


# ---- errors --------------------------------------------------------------------------------------
def drop_last(values: list[Any]) -> list[Any]:
    return values[:-1]


def reshaped(values: list[Tensor]) -> list[Tensor]:
    return [*values[:-1], values[-1].reshape(-1, 1)]


def integers(values: list[Tensor]) -> list[Tensor]:
    return [*values[:-1], values[-1].int()]


def two_numbers(values: list[Tensor]) -> list[Tensor]:
    return [*values[:-1], torch.zeros(2)]


BROKEN = [
    *((n, label, f) for n in LISTS for label in LISTS[n][1:] for f in (drop_last, reshaped)),
    *((n, label, integers) for n in LISTS for label in LISTS[n]),
    ("adamw_step_", "steps", drop_last),
    ("adamw_step_", "steps", two_numbers),
    ("adamw_step_", "steps", integers),
    ("decayed_update_", "factors", drop_last),
    ("rotated_adam_", "scales", drop_last),
]


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "dispatched"])
@pytest.mark.parametrize(("name", "label", "damage"), BROKEN)
def test_errors_come_before_anything_is_written(
    name: str, label: str, damage: Callable[[Any], Any], checked: bool
) -> None:
    arguments = mapped(make(name, [(4, 5), (6, 7)]), copied)
    arguments[label] = damage(arguments[label])
    before = mapped(arguments, copied)
    call = op(name) if checked else op(name).overload
    with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
        call(**arguments)
    for key in mutated(name):
        assert all(map(same, arguments[key], before[key])), key


@pytest.mark.parametrize("name", MATRICES)
def test_norms_are_of_matrices(name: str) -> None:
    arguments = make(name, [(5,)])
    for call in (op(name), op(name).overload):
        with pytest.raises((ValueError, RuntimeError), match=f"{name}.*2 dimensions"):
            call(**arguments)


# ---- every instruction set -----------------------------------------------------------------------
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_isa(isa: str) -> None:
    """The tests of values on a lower instruction set (csrc/cpu/isa.h reads it once)."""
    chosen = "errors or layouts or norm or conversions or adamw"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, __file__],
        env={**os.environ, "ORTHONORM_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
