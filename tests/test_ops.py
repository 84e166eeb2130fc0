"""Every op, one row each of `orthonorm.bench.cases`, through the same bodies.

The rule for numbers: err(dispatched op) <= 2 err(same-dtype reference), both root mean squares
relative to the output's scale against the reference in float64 on the same inputs, pooled over a
few inputs where matrices are small. On few elements a reference may be exact by luck where a kernel
as good as it rounds elsewhere; so TINY ulp per iteration are added, over the root of the number of
elements, as luck averages out. No single entry may stand out either: the largest error may be 4
times the reference's. In float64 the oracle is as inexact as the op; there the reference's error is
what it makes in float32 on such inputs, times 2^-29, and the ulp are added whole. Codes are the
oracle's. Where numbers are rounded to codes behind arithmetic, one may be the code beside it, for
twice as many as the reference has, and one more.
"""

from __future__ import annotations

import math
from typing import Any

import orthonorm
import pytest
import torch
from orthonorm._library import LOADED, OPS
from orthonorm.bench.cases import CASES, STEPS, Case, Outputs, as_list, tensors
from orthonorm.bench.inputs import LAYOUTS, Arguments, Inputs, copied, doubled, map_tensors, storage
from orthonorm.bench.shapes import AWKWARD, EMPTY, Shape, Workload, describe
from pooled_errors import Errors
from torch import Tensor

TINY = 4  # an input rounding, a product, a sum and a last rounding
Shapes = tuple[Shape, ...]
ALL = tuple(CASES.values())
LIST = ((5, 9), (3, 4, 7), (33, 16), (1, 1))
DTYPES = ("float32", "bfloat16", "float16", "float64", "mixed")
EACH = pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)


def fits(case: Case, shape: Shape) -> bool:
    return case.limit is None or max(shape[-2:]) <= case.limit


def made(case: Case, shapes: Shapes, inputs: Inputs, **keywords: Any) -> Arguments:
    """The arguments of one call; an op on one matrix takes the first shape."""
    shapes = tuple(s for s in shapes if fits(case, s))
    shapes = shapes if case.takes_list else shapes[:1]
    (arguments,) = case.calls(Workload("", shapes), inputs, **keywords)
    return arguments


def run(case: Case, f: Any, arguments: Arguments) -> Outputs:
    with torch.no_grad():
        return case.outputs(arguments, f(**arguments))


def depth(arguments: Arguments) -> int:
    """Iterations in a row, each rounding anew."""
    steps = arguments.get("steps", 1)
    triples = len(arguments.get("coefficients", ())) // 3
    return max(1, triples, steps if isinstance(steps, int) else 1)


def roundoff(case: Case, arguments: Arguments, t: Tensor) -> float:
    """eps of an output's dtype, or of the coarser arithmetic the op is free to do."""
    inside = arguments.get("dtype", t.dtype)
    precision = arguments.get("precision", "auto" if "restarts" in arguments else "full")
    wide = any(x.dtype == torch.float64 for x in next(iter(tensors(arguments).values())))
    if precision not in ("auto", "full"):
        inside = getattr(torch, precision)
    elif wide or case.name == "magnitude":
        inside = torch.float64
    elif "dtype" not in arguments:
        inside = torch.bfloat16 if precision == "auto" else torch.float32
    return max(torch.finfo(inside).eps, torch.finfo(t.dtype).eps)


def judged(case: Case, outputs: Outputs) -> Outputs:
    """Outputs as they are compared: quotients times the divisors that were returned with them."""
    found = dict(outputs)
    for name in case.quotients:
        members = [x.shape[:-2].numel() for x in outputs[name]]
        divisors = outputs["result0"][0].double().split(members)
        pairs = zip(outputs[name], divisors, strict=True)
        found[name] = [
            x.double() * torch.where(d == 0, 1.0, d).view(*x.shape[:-2], 1, 1) for x, d in pairs
        ]
    return found


def pooled(case: Case, f: Any, calls: list[Arguments]) -> dict[str, Errors]:
    """How far an implementation is from the float64 oracle, output by output."""
    found: dict[str, Errors] = {}
    for arguments in calls:
        want = judged(case, run(case, case.op.reference, doubled(arguments)))
        got = judged(case, run(case, f, copied(arguments)))
        assert got.keys() == want.keys()
        for name, values in got.items():
            pool = found.setdefault(name, Errors())
            for value, right in zip(values, want[name], strict=True):
                if value.is_floating_point():
                    pool.add(value, right)
                else:
                    pool.add_codes(value, right)
    return found


def check_numbers(
    case: Case, shapes: Shapes, inputs: Inputs, kernel: Any = None, **variant: Any
) -> None:
    """The rule, for everything returned and written; inputs and gaps between rows untouched.

    `kernel` is what is tested: the dispatched op, or another backend's function.
    """
    kernel = kernel or case.op
    repeats = min(8, max(1, 1000 // sum(math.prod(s) for s in shapes)))
    seeds = [inputs.but(seed=inputs.seed + 7 * r) for r in range(repeats)]
    calls = [made(case, shapes, seed, **variant) for seed in seeds]
    mine, bound = pooled(case, kernel, calls), pooled(case, case.op.reference, calls)
    wide = inputs.dtype == torch.float64
    if wide:
        single = {"dtype": torch.float32, "scale": 1.0}
        twins = [made(case, shapes, seed.but(**single), **variant) for seed in seeds]
        twin = pooled(case, case.op.reference, twins)
    after = copied(calls[0])
    outputs = run(case, kernel, after)
    for name, error in mine.items():
        if not outputs[name][0].is_floating_point():
            most = 2 * bound[name].moved + 1 if name in case.rounded else 0
            assert error.moved <= most, f"{case.name}: {error.moved} codes of {name} are off"
            continue
        unit = TINY * depth(calls[0]) * roundoff(case, calls[0], outputs[name][0])
        typical, largest = bound[name].typical, bound[name].largest
        if wide:
            typical = max(typical, 2.0**-29 * twin[name].typical)
            largest = max(largest, 2.0**-29 * twin[name].largest)
        luck = 1 if wide else max(error.count, 1)
        allowed = 2 * typical + unit / luck**0.5
        assert error.typical <= allowed, (
            f"{case.name}: {name} is off by {error.typical:.2e}, the reference by {typical:.2e}, "
            f"allowed {allowed:.2e}"
        )
        allowed = 4 * largest + 2 * unit
        assert error.largest <= allowed, (
            f"{case.name}: an entry of {name} is off by {error.largest:.2e}, of the reference by "
            f"{largest:.2e}, allowed {allowed:.2e}"
        )
    check_untouched(case, calls[0], after)


def bits(t: Tensor) -> Tensor:
    return storage(t).view(torch.uint8)


def check_untouched(case: Case, before: Arguments, after: Arguments) -> None:
    """Inputs bit for bit as they were; of mutated views only the elements changed."""
    for name, values in tensors(after).items():
        for i, (new, old) in enumerate(zip(values, as_list(before[name]), strict=True)):
            if name in case.mutated:
                new = copied({"": new})[""].copy_(old)
            assert torch.equal(bits(new), bits(old)), f"{case.name} touched {name}[{i}]"


def by_dtype(case: Case) -> tuple[str, ...]:
    return tuple(d for d in DTYPES if d != "mixed" or "mixed" in case.dtypes)


NUMBERS = [
    pytest.param(case, dtype, shapes, id=f"{case.name}-{dtype}-{describe(shapes)}")
    for case in ALL
    for dtype in by_dtype(case)
    for shapes in (*((s,) for s in AWKWARD if fits(case, s)), *((LIST,) if case.takes_list else ()))
]


@pytest.mark.parametrize(("case", "dtype", "shapes"), NUMBERS)
def test_error(case: Case, dtype: str, shapes: Shapes) -> None:
    check_numbers(case, shapes, Inputs.named(dtype))


VARIANTS = [
    pytest.param(case, dtype, variant, id=f"{case.name}-{dtype}-{i}")
    for case in ALL
    for dtype in by_dtype(case)
    for i, variant in enumerate(case.variants)
]


@pytest.mark.parametrize(("case", "dtype", "variant"), VARIANTS)
def test_variant(case: Case, dtype: str, variant: Arguments) -> None:
    """The other keywords of each row, on a list that holds a batch, wide, tall and square ones."""
    for shapes in (((3, 16, 40), *LIST), ((40, 16),)):
        check_numbers(case, shapes, Inputs.named(dtype, seed=1), **variant)


@EACH
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layout(case: Case, layout: str, dtype: str) -> None:
    """Views: transposed, batches innermost, rows cut out of wider ones, every second element."""
    for shapes in (((19, 35), (2, 6, 5), (1, 8)), ((2, 3, 17, 9),)):
        check_numbers(case, shapes, Inputs.named(dtype, layout=layout))


@EACH
@pytest.mark.parametrize("shape", EMPTY, ids=lambda s: "x".join(map(str, s)))
def test_empty(case: Case, shape: Shape, dtype: str = "float32") -> None:
    """Empty batches and empty sides: the float64 reference's shapes, nothing non-finite."""
    arguments = made(case, (shape,), Inputs.named(dtype))
    got = run(case, case.op, copied(arguments))
    want = run(case, case.op.reference, doubled(arguments))
    for name, values in got.items():
        for value, right in zip(values, want[name], strict=True):
            assert value.shape == right.shape
            assert bool(value.isfinite().all()), name


@pytest.mark.parametrize("case", [c for c in ALL if c.takes_list], ids=lambda c: c.name)
def test_empty_list(case: Case) -> None:
    got = run(case, case.op, made(case, (), Inputs()))
    assert all(value.numel() == 0 for values in got.values() for value in values)


@EACH
def test_zero(case: Case, dtype: str = "float32") -> None:
    """Zeros everywhere and eps = 0: nothing non-finite; what maps matrices maps zero to zero."""
    arguments = made(case, ((3, 8, 5), (4, 6)), Inputs.named(dtype))
    keep = ("lr", "momentum", "steps", "norms")
    zeros = {k: v if k in keep else map_tensors(v, torch.zeros_like) for k, v in arguments.items()}
    if "eps" in zeros:
        zeros["eps"] = 0.0
    for name, values in run(case, case.op, zeros).items():
        for value in values:
            assert bool(value.isfinite().all()), name
            maps = name in ("result", "X", "params")
            if maps and case.name != "gram_polynomial":  # of 0: a multiple of I
                assert not bool(value.any()), name


SCALES = {"float32": (2.0**-133, 2.0**-100, 2.0**119), "float64": (2.0**-1000, 2.0**1000)}


@pytest.mark.parametrize("case", [c for c in ALL if c.scale_free], ids=lambda c: c.name)
@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d, v in SCALES.items() for s in v])
def test_scale(case: Case, dtype: str, scale: float) -> None:
    """Denormals (1e-40) and numbers whose squares overflow (1e36) are numbers like others."""
    check_numbers(case, ((6, 9), (2, 7, 4)), Inputs.named(dtype, scale=scale))


@EACH
@pytest.mark.parametrize("scale", [1e-40, 1e36], ids=["1e-40", "1e36"])
def test_finite_stays_a_number(case: Case, scale: float, dtype: str = "float32") -> None:
    """No op makes NaN of finite numbers; words may overflow, and Gram entries may cancel inf."""
    arguments = made(case, ((6, 9), (2, 7, 4)), Inputs.named(dtype, scale=scale))
    if case.name in ("gram", "apply", "direct_polynomial", "gram_form") and scale > 1:
        return  # words of the algorithm: their callers scale
    for name, values in run(case, case.op, arguments).items():
        assert not any(bool(value.isnan().any()) for value in values), name


@pytest.mark.parametrize("name", ["newton_schulz", "small_newton_schulz"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_power_of_two(name: str, dtype: str) -> None:
    """f(2^k X) == f(X), bit for bit."""
    case = CASES[name]
    arguments = made(case, ((3, 20, 12), (33, 16), (150, 40)), Inputs.named(dtype))
    plain = run(case, case.op, arguments)["result"]
    for k in (-60, 60):
        scaled = {**arguments, "X": [x * 2.0**k for x in arguments["X"]]}
        for a, b in zip(run(case, case.op, scaled)["result"], plain, strict=True):
            assert torch.equal(a, b)


def members(outputs: Outputs, member: int) -> list[Tensor]:
    """What belongs to one of three matrices, given as a list of three or as a batch of three."""
    found = []
    for values in outputs.values():
        if len(values) == 3:
            found.append(values[member])
        else:
            found += [t[member] for t in values if t.dim() and t.shape[0] == 3]
    return found


@EACH
@pytest.mark.parametrize("shapes", [((3, 9, 14),), ((9, 14),) * 3], ids=["batch", "list"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nonfinite_stays_inside(
    case: Case, shapes: Shapes, bad: float, dtype: str = "float32"
) -> None:
    """NaN or Inf in one matrix: the other results are what they are without it, bit for bit."""
    if len(shapes) > 1 and not case.takes_list:
        pytest.skip("takes one (batch of) matrices")
    arguments = made(case, shapes, Inputs.named(dtype))
    clean = run(case, case.op, copied(arguments))
    for name, values in tensors(arguments).items():
        if values[0].dim() < 2 or not values[0].is_floating_point():
            continue
        poisoned = copied(arguments)
        target = as_list(poisoned[name])
        (target[1] if len(target) == 3 else target[0][1]).view(-1)[0] = bad
        got = run(case, case.op, poisoned)
        for member in (0, 2):
            pairs = zip(members(got, member), members(clean, member), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (name, member)


def test_magnitude_sees_every_entry() -> None:
    X = torch.randn(4, 50, 70)
    X[1, 49, 69], X[2, 0, 0], X[3, 20, 33] = float("nan"), float("inf"), -float("inf")
    finite = orthonorm.ops.magnitude([X]).isfinite()
    assert finite.tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["gram", "symmetric_update"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_bitwise_symmetric(name: str, dtype: str) -> None:
    case = CASES[name]
    for shape in ((67, 131), (3, 40, 21), (1, 5)):
        (result,) = run(case, case.op, made(case, (shape,), Inputs.named(dtype)))["result"]
        assert torch.equal(result, result.mT)


SERVED = [c for c in ALL if not c.op.composite and (c.name, "CPU") in LOADED.served]


@pytest.mark.parametrize("case", SERVED, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_and_company(case: Case, dtype: str) -> None:
    """A kernel's results are the same bits for 1 and 2 threads, alone, in a list and in a batch."""
    shapes = ((5, 90, 120), (128, 100), (1, 128), (64, 3))
    arguments = made(case, shapes, Inputs.named(dtype))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case, case.op, copied(arguments))
        torch.set_num_threads(2)
        two = run(case, case.op, copied(arguments))
    finally:
        torch.set_num_threads(threads)
    for name, values in one.items():
        assert all(torch.equal(a, b) for a, b in zip(values, two[name], strict=True)), name
    alone = run(case, case.op, first_member(case, copied(arguments)))
    for name, values in alone.items():
        both = one[name][0]
        if both.dim():
            both = both[:1] if name.startswith("result") and both.dim() == 1 else both[0]
        assert torch.equal(values[0].reshape(both.shape), both), name


def first_member(case: Case, arguments: Arguments) -> Arguments:
    """The same call on the first matrix of the first entry alone."""
    found = dict(arguments)
    for name, values in tensors(arguments).items():
        value = arguments[name]
        if isinstance(value, Tensor):
            if value.dim():
                found[name] = value[:1] if case.takes_list or value.dim() == 1 else value[0]
        else:
            found[name] = [values[0] if values[0].dim() == 0 else values[0][0]]
    if "factors" in found:
        found["factors"] = found["factors"][:1]
    return found


# ---- the table itself ----------------------------------------------------------------------------
def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(OPS)


def test_every_optimizer_has_a_step() -> None:
    optim = pytest.importorskip("orthonorm.optim")
    assert {step.optimizer for step in STEPS.values()} == set(optim.REGISTRY)


def test_work_is_counted() -> None:
    """FLOPs against the formula in units of n^3: direct quintic 5 (4 a + 2)."""
    case = CASES["newton_schulz"]
    (arguments,) = case.calls(Workload("", ((64, 256), (256, 64))), Inputs())
    assert case.flops(arguments) == 2 * 5 * (4 * 4 + 2) * 64**3
