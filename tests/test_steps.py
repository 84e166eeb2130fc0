"""The passes over lists of tensors: rotated_adam_, magnitude, muon_prologue_, decayed_update_,
adamw_step_. Errors are measured against the references in float64 (passes.py)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from orthonorm import ops
from passes import (
    F32,
    F64,
    LISTS,
    MATRICES,
    MIXES,
    ROWS,
    Layout,
    check_errors,
    copied,
    digest,
    distance,
    make,
    mapped,
    mutated,
    op,
    run,
    same,
    shapes_of,
)
from torch import Tensor

HERE = Path(__file__).parent


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
    ops.decayed_update_([w], [u], torch.tensor(1.0), torch.tensor(1.0), [1.0])
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
    wanted, numbers = flat - 0.5, (torch.tensor(0.5), torch.tensor(0.0))
    with torch.no_grad():
        ops.decayed_update_(params, updates, *numbers, [1.0, 1.0])
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
            key: value[i : i + 1]
            if isinstance(value, list) or key in ("scales", "corrections")
            else value
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
            rate, decay = (torch.tensor(x, dtype=F64) for x in (1e-2, keywords["weight_decay"]))
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


def without_value(value: Tensor) -> Tensor:
    return value.to("meta")


BROKEN = [
    *((n, label, f) for n in LISTS for label in LISTS[n][1:] for f in (drop_last, reshaped)),
    *((n, label, integers) for n in LISTS for label in LISTS[n]),
    ("adamw_step_", "steps", drop_last),
    ("adamw_step_", "steps", two_numbers),
    ("adamw_step_", "steps", integers),
    ("adamw_step_", "lr", without_value),
    ("decayed_update_", "lr", without_value),
    ("muon_prologue_", "momentum", without_value),
    ("decayed_update_", "factors", drop_last),
    ("rotated_adam_", "scales", drop_last),
    ("elementwise_moment_", "corrections", drop_last),
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
def under(isa: str, *command: str) -> str:
    """Output of a fresh process, as csrc/cpu/isa.h reads ORTHONORM_ISA once."""
    environment = {**os.environ, "ORTHONORM_ISA": isa}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    assert under(isa, "passes.py").strip() == digest()


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_edges_on_other_instruction_sets(isa: str) -> None:
    under(isa, "-m", "pytest", "-x", "-p", "no:cacheprovider", "test_steps_edges.py")
