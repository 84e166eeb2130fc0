"""What the tests of the passes over lists share: arguments, runs on copies, the rule for errors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from orthonorm._library import OPS, Op
from orthonorm.ops.mantissa import joined, split_
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Arguments = dict[str, Any]
Layout = Callable[[Tensor], Tensor]


# The tensor lists of each op, the other arguments of a list of n, and its variants.
LISTS = {
    "rotated_adam_": ("exp_avg", "exp_avg_sq", "X"),
    "elementwise_moment_": ("moments", "X"),
    "magnitude": ("X",),
    "muon_prologue_": ("grads", "momentum_buffers", "updates"),
    "decayed_update_": ("params", "updates"),
    "adamw_step_": ("params", "grads", "exp_avg", "exp_avg_sq"),
}
MATRICES = ("elementwise_moment_", "magnitude", "muon_prologue_")
VARIANTS: dict[str, tuple[Arguments, ...]] = {
    "rotated_adam_": ({}, {"eps": 0.0}, {"scales": None}),
    "elementwise_moment_": ({}, {"eps": 0.0}, {"corrections": None}),
    "magnitude": ({},),
    "muon_prologue_": (
        {},
        {"nesterov": False},
        {"momentum": torch.tensor(0.5)},
        {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
        {"found_inf": torch.tensor(2.0)},
    ),
    "decayed_update_": (
        {},
        {"weight_decay": torch.tensor(0.0)},
        {"rounding": torch.tensor(7 << 40)},
        {"found_inf": torch.tensor(1.0)},
    ),
    "adamw_step_": (
        {},
        {"decay_first": False, "correct_eps": False},
        {"weight_decay": torch.tensor(0.0), "eps": 0.0, "lr": torch.tensor(0.01)},
        {"rounding": torch.tensor(7)},
        {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
        {"found_inf": torch.tensor(1.0), "rounding": torch.tensor(7)},
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
            x = x.square() + 0.01 if label in ("exp_avg_sq", "moments") else x
            x = x.to(dtypes[k])
            made[label].append(layouts[k % len(layouts)](x) if layouts else x)
    n = len(shapes)
    if name == "rotated_adam_":
        made |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        made["scales"] = torch.linspace(0.3, 2.0, n, dtype=F64)
    if name == "elementwise_moment_":
        made |= {"beta2": 0.999, "eps": 1e-8}
        made["corrections"] = torch.linspace(31.0, 1.0, n, dtype=F64)
    if name == "muon_prologue_":
        made["momentum"] = torch.tensor(0.95, dtype=F64)
    if name == "decayed_update_":
        made |= {"lr": torch.tensor(0.02, dtype=F64), "weight_decay": torch.tensor(0.3, dtype=F64)}
        made["factors"] = [0.1 + 0.3 * i for i in range(n)]
    if name == "adamw_step_":
        made["steps"] = [torch.tensor(float(i), dtype=(F32, F64)[i % 2]) for i in range(n)]
        made |= {"lr": torch.tensor(0.01, dtype=F64), "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        made["weight_decay"] = torch.tensor(0.1, dtype=F64)
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
    """What the op writes of the arguments that it always has."""
    arguments = OPS[name].overload._schema.arguments
    always = [a for a in arguments if not a.has_default_value()]
    return [a.name for a in always if a.alias_info is not None and a.alias_info.is_write]


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
    written = {"muon_prologue_": "updates", "elementwise_moment_": "X"}
    matrices = exact[written[name]] if name in written else arguments["X"]
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


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(INTEGERS[t.element_size()])


def check_halves_of_adamw(some: Sequence[tuple[int, ...]], emulated: bool = False) -> None:
    """Weights and mantissas are float32 weights, to the bit, for gradients and state of any dtypes;
    skipped, all is as it was. The second shape has two dimensions, which are transposed there.
    Where kernels are emulated each mix of dtypes has one variant."""
    shapes = [*some, (2049, 4), (0, 3), ()]
    for i, mix in enumerate(("half-weights", "bfloat16", "float32", "wide-states")):
        for variant in (i % 3,) if emulated else range(3):
            given = make("adamw_step_", shapes, MIXES[mix], variant=variant)
            whole = given.pop("params")
            halves = [torch.empty_like(x, dtype=BF16) for x in whole]
            halves[1] = halves[1].mT.contiguous().mT
            mantissas = [torch.zeros_like(w, dtype=torch.int16) for w in halves]
            whole = [x.to(F32) * 1.001 for x in whole]
            for w, m, x in zip(halves, mantissas, whole, strict=True):
                split_(w, m, x)
            other = mapped(given, torch.clone)
            for _ in range(3):
                OPS["adamw_step_"](halves, **other, mantissas=mantissas)
                OPS["adamw_step_"](whole, **given)
            for w, m, x in zip(halves, mantissas, whole, strict=True):
                assert torch.equal(bits(joined(w, m)), bits(x))
            for key in ("exp_avg", "exp_avg_sq", "steps"):
                assert all(torch.equal(a, b) for a, b in zip(given[key], other[key], strict=True))
            found = other | {"found_inf": torch.tensor(1.0)}
            OPS["adamw_step_"](halves, **found, mantissas=mantissas)
            for w, m, x in zip(halves, mantissas, whole, strict=True):
                assert torch.equal(bits(joined(w, m)), bits(x))
            for key in ("exp_avg", "exp_avg_sq", "steps"):
                assert all(torch.equal(a, b) for a, b in zip(given[key], other[key], strict=True))


def digest() -> str:
    """A hash of all results whose bits every instruction set shares: not sums of wide squares."""
    torch.set_num_threads(1)
    bits = hashlib.sha256()
    for name in LISTS:
        for mix in MIXES:
            results = run(op(name), name, make(name, [(33, 65), (1, 17), (7, 1100)], MIXES[mix]))
            if F64 in MIXES[mix][: len(LISTS[name])]:
                results.pop("norms", None)
            for label in sorted(results):
                for t in results[label]:
                    bits.update(t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


if __name__ == "__main__":
    print(digest())
