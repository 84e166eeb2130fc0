"""NVIDIA-NeMo/Emerging-Optimizers: the functions that Megatron's Muon calls, on these kernels.

    from orthonorm.compat.emerging_optimizers import get_muon_scale_factor, newton_schulz_tp

Source: https://github.com/NVIDIA-NeMo/Emerging-Optimizers, release 0.3.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks as check
from .. import polar
from ..coefficients import COEFFICIENTS, Coefficients, PastEnd
from ..distributed.spread import Spread, finished
from ..ops import divide_each
from ..ops.words import triples_of
from ..optim.settings import ADJUST
from ..polar import polynomial

__all__ = [
    "get_muon_scale_factor",
    "newton_schulz",
    "newton_schulz_tp",
]

# Their name of a set: our name, and what they do when asked for more steps than triples.
SETS: dict[str, tuple[str, PastEnd]] = {
    "simple": ("keller", "cycle"),
    "quintic": ("you5", "cycle"),
    "polar_express": ("polar_express_nvidia", "repeat_last"),
    "cans": ("cans", "repeat_last"),
    "aol": ("aol_flipping", "cycle"),  # refused when used: it reverses singular directions
    "deepseekv4": ("deepseek_v4", "repeat_last"),
}
SCALES = {"shape_scaling": "original", "spectral": "spectral_max", "unit_rms_norm": "spectral"}


def newton_schulz(
    x: Tensor,
    steps: int,
    coefficient_type: str = "quintic",
    custom_coefficient_sets: Sequence[Sequence[float]] | None = None,
    eps: float = 1e-7,
    transpose: bool | None = None,
    tp_group: Any = None,
    use_syrk: bool = False,
) -> Tensor:
    """f(x / max(|x|_F, eps)), f `steps` of a set of quintics: float32, of the shape of x.

    Args:
        x: float32, (m, n) or (batch, m, n).
        steps, coefficient_type, custom_coefficient_sets: "simple", "quintic", "polar_express",
            "cans", "deepseekv4" or "custom". "aol", which reverses singular directions, is refused.
        eps: lower clamp of the norm.
        transpose: side of which the Gram matrix is formed. f is the same from both sides, so this
            matters only with `tp_group`: True if the ranks have rows of the matrix, False if they
            have columns.
        tp_group: process group whose ranks each have a part of x. Gram matrices are summed over
            it: one at the start and one at each restart. The original sums one at each step. So
            does this function if the whole matrix has fewer columns than rows (fewer rows than
            columns if transposed).
        use_syrk: has no effect here.

    Precision: float32 in direct form. If torch.get_float32_matmul_precision() is "medium", it is
    that of `orthonorm.polar` with "auto" (in the original: bfloat16).
    """
    name = "newton_schulz"
    check.tensor(name, "x", x, min_dim=2)
    if x.dtype != torch.float32 or x.dim() > 3:
        raise TypeError(f"{name}: x must be float32, 2-D or 3-D, got {x.dtype}, {x.dim()}-D")
    coefficients = _coefficients(name, coefficient_type, custom_coefficient_sets)
    medium = torch.get_float32_matmul_precision() == "medium"
    if tp_group is None:
        method, precision = ("auto", "auto") if medium else ("direct", "full")
        return polar(x, coefficients, steps=steps, method=method, precision=precision, eps=eps)
    if transpose is None:
        raise ValueError(f"{name}: transpose must be True or False with tp_group, got None")
    return _spread(x.mT if transpose else x, coefficients, steps, eps, tp_group, transpose)


def _coefficients(name: str, kind: str, custom: Any) -> Coefficients:
    """Return the schedule of a `coefficient_type`; `name` stands in error messages."""
    if kind == "custom":
        if not custom:
            raise ValueError(f"{name}: custom_coefficient_sets must be given, got {custom!r}")
        triples = tuple(tuple(triple) for triple in custom)
        return Coefficients("custom", triples, "the caller", past_end="cycle")
    check.choice(name, "coefficient_type", kind, (*SETS, "custom"))
    ours, past_end = SETS[kind]
    return replace(COEFFICIENTS[ours], past_end=past_end, prescale="frobenius")


def _spread(
    x: Tensor, coefficients: Coefficients, steps: int, eps: float, group: Any, transpose: bool
) -> Tensor:
    """Return f of a matrix from x, this rank's columns: Gram form, with Gram matrices summed.

    If the whole matrix has fewer columns than rows, its Gram matrix is singular and iterating on it
    would amplify rounding. It is then formed anew at each step.
    """
    p = polynomial(coefficients, steps, method="gram", precision="float32")
    columns = x.shape[-1] * dist.get_world_size(group)
    restarts = p.restarts if x.shape[-2] <= columns else list(range(1, steps))
    spread = Spread(group)
    norms = finished(spread.norms([x]))
    X = divide_each(x, p.safety * norms.clamp(min=eps), torch.float32)
    triples = triples_of(p.coefficients)
    (X,) = finished(spread.polynomial([X], triples, restarts, torch.float32))
    return X.mT.contiguous() if transpose else X


def newton_schulz_tp(
    x: Tensor,
    steps: int,
    coefficient_type: str,
    tp_group: Any,
    partition_dim: int | None = None,
    tp_mode: str = "duplicated",
    use_syrk: bool = False,
) -> Tensor:
    """Return this rank's part of `newton_schulz` of the matrix of which x is this rank's part.

    Args:
        x: float32, (m, n); the parts of all ranks of `tp_group` have equal sizes.
        partition_dim: 0 or 1, the dimension along which the matrix is cut; None: x is whole.
        tp_mode: "duplicated" gathers the matrix on every rank, "distributed" sums Gram matrices.
        steps, coefficient_type, use_syrk: as `newton_schulz`.
    """
    name = "newton_schulz_tp"
    check.choice(name, "partition_dim", partition_dim, (None, 0, 1))
    check.choice(name, "tp_mode", tp_mode, ("duplicated", "distributed"))
    if partition_dim is None:
        return newton_schulz(x, steps, coefficient_type)
    if tp_mode == "distributed":
        return newton_schulz(
            x, steps, coefficient_type, transpose=partition_dim == 0, tp_group=tp_group
        )
    ranks, rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, x.contiguous(), group=tp_group)
    whole = newton_schulz(torch.cat(parts, partition_dim), steps, coefficient_type)
    return whole.chunk(ranks, partition_dim)[rank].contiguous()


def get_muon_scale_factor(size_out: int, size_in: int, mode: str = "spectral") -> float:
    """Return the factor of an update of size_out x size_in by `mode`.

    "shape_scaling": sqrt(max(1, size_out / size_in)). "spectral": sqrt(max(size_out, size_in)).
    "unit_rms_norm": sqrt(size_out / size_in).
    """
    check.choice("get_muon_scale_factor", "mode", mode, tuple(SCALES))
    return ADJUST[SCALES[mode]](size_out, size_in)
