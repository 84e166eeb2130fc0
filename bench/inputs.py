"""Inputs: matrices of named spectra, the companions an op needs, and their float64 twins.

Every tensor is a function of (seed, tag, shape), so a case can be rebuilt alone and in any order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .shapes import Shape

Arguments = dict[str, Any]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MIXED = "mixed"  # bfloat16 parameters and gradients, float32 states
DTYPE_NAMES = (*DTYPES, MIXED)


def _logarithmic(low: float) -> Callable[[int], Tensor]:
    return lambda k: torch.logspace(0, math.log10(low), k, dtype=torch.float64)


def _half_rank(k: int) -> Tensor:
    return (torch.arange(k) < (k + 1) // 2).double()


def _two_spikes(k: int) -> Tensor:
    values = torch.logspace(-4, -7, k, dtype=torch.float64)
    values[:2] = torch.tensor([1.0, 0.5], dtype=torch.float64)[:k]
    return values


def _power_law(k: int) -> Tensor:
    return 1.0 / torch.arange(1, k + 1, dtype=torch.float64)


def _low_rank(k: int) -> Tensor:
    return torch.where(torch.arange(k) < 32, 1.0, 1e-3).double()


# Singular values of k numbers; None: independent normal entries.
SPECTRA: dict[str, Callable[[int], Tensor] | None] = {
    "gaussian": None,
    "log-1e-2": _logarithmic(1e-2),
    "log-1e-5": _logarithmic(1e-5),
    "ill-1e-6": _logarithmic(1e-6),
    "half-rank": _half_rank,
    "two-spikes": _two_spikes,
    "power-law": _power_law,
    "rank-32-noise": _low_rank,
}
LAYOUTS = ("contiguous", "transposed", "reversed", "sliced", "strided")


def place(t: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout: "transposed" storage, all dimensions "reversed" (batches
    innermost), rows cut out of wider ones ("sliced", unaligned), every second element of both last
    dimensions ("strided")."""
    if layout == "transposed" and t.dim() >= 2:
        return t.mT.contiguous().mT
    if layout == "reversed":
        backwards = tuple(reversed(range(t.dim())))
        return t.permute(backwards).contiguous().permute(backwards)
    if layout not in ("sliced", "strided") or t.dim() == 0:
        return t
    step = 2 if layout == "strided" else 1
    sides = [step * n + 3 if d >= t.dim() - 2 else n for d, n in enumerate(t.shape)]
    buffer = torch.full(sides, 7.0, dtype=t.dtype, device=t.device)  # not zero: to be missed
    view = buffer
    for d in range(max(0, t.dim() - 2), t.dim()):
        view = view[(slice(None),) * d + (slice(1, 1 + step * t.shape[d], step),)]
    return view.copy_(t)


@dataclass(frozen=True)
class Inputs:
    """Makes the tensors of one case: what dtype, where, of which spectrum, in which layout."""

    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None  # None: dtype
    device: str = "cpu"
    spectrum: str = "gaussian"
    layout: str = "contiguous"
    seed: int = 0
    scale: float = 1.0  # multiplies what `matrix` makes

    @classmethod
    def named(cls, dtype: str, **settings: Any) -> Inputs:
        """Inputs for a dtype by its name on the command line ("mixed" included)."""
        if dtype == MIXED:
            return cls(torch.bfloat16, torch.float32, **settings)
        return cls(DTYPES[dtype], **settings)

    @property
    def states(self) -> torch.dtype:
        return self.state_dtype or self.dtype

    def but(self, **changes: Any) -> Inputs:
        return replace(self, **changes)

    def _generator(self, tag: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(tag.encode()))

    def normal(self, tag: str, shape: Shape) -> Tensor:
        """Independent normal entries, drawn in float32 (float64 if that is wanted) on the CPU."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=self._generator(tag), dtype=wide)

    def orthogonal(self, tag: str, rows: int, columns: int) -> Tensor:
        """Orthonormal columns, float64."""
        return torch.linalg.qr(self.normal(tag, (rows, columns)).double())[0]

    def put(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor as an argument: dtype, device, layout."""
        return place(t.to(self.device, dtype or self.dtype), self.layout)

    def matrix(self, tag: str, shape: Shape) -> Tensor:
        """A (batch of) matrices with the wanted singular values, times `scale`."""
        values = SPECTRA[self.spectrum]
        k = min(shape[-2:])
        if values is None or math.prod(shape) == 0:
            return self.put(self.normal(tag, shape) * self.scale)
        members = []
        for i in range(math.prod(shape[:-2])):
            left = self.orthogonal(f"{tag}.{i}.u", shape[-2], k)
            right = self.orthogonal(f"{tag}.{i}.v", shape[-1], k)
            members.append((left * values(k)) @ right.mT)
        return self.put(torch.stack(members).view(shape) * self.scale)

    def state(self, tag: str, shape: Shape) -> Tensor:
        """A first moment."""
        return self.put(self.normal(tag, shape), self.states)

    def moment(self, tag: str, shape: Shape) -> Tensor:
        """A second moment near 1: far from the data's own, a pass that divides by its root would
        take its matrix to denormals within a few dozen repeats."""
        return self.put(0.1 * self.normal(tag, shape).square() + 0.9, self.states)

    def unit(self, tag: str, shape: Shape) -> Tensor:
        """Unit vectors along the last dimension."""
        return self.put(torch.nn.functional.normalize(self.normal(tag, shape), dim=-1))

    def basis(self, tag: str, shape: Shape) -> Tensor:
        """Orthogonal matrices for the short side of `shape`, in the states' dtype."""
        batch, k = shape[:-2], min(shape[-2:])
        members = [self.orthogonal(f"{tag}.{i}", k, k) for i in range(math.prod(batch))]
        stack = torch.stack(members) if members else torch.empty(0, k, k)
        return self.put(stack.view(*batch, k, k), self.states)

    def number(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """A scheduled number: a 0-d tensor on the device."""
        return torch.tensor(value, dtype=dtype, device=self.device)

    def numbers(self, values: Sequence[float]) -> Tensor:
        """One number per matrix of a list: 1-D float64."""
        return torch.tensor(list(values), dtype=torch.float64, device=self.device)


def map_tensors(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """`f` over every tensor of nested lists and dicts of arguments."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, (list, tuple)):
        return [map_tensors(v, f) for v in value]
    if isinstance(value, dict):
        return {k: map_tensors(v, f) for k, v in value.items()}
    return value


def storage(t: Tensor) -> Tensor:
    """All of the memory a view lies in, gaps included, 1-D."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def copied(arguments: Arguments) -> Arguments:
    """The same arguments in storage of their own: strides, offsets and what lies between kept."""

    def copy(t: Tensor) -> Tensor:
        return storage(t).clone().as_strided(t.shape, t.stride(), t.storage_offset())

    copies: Arguments = map_tensors(arguments, copy)
    return copies


def doubled(arguments: Arguments) -> Arguments:
    """The same numbers in float64, products included: what the oracle runs on."""
    wide: Arguments = map_tensors(
        arguments, lambda t: t.to(torch.float64, copy=True) if t.is_floating_point() else t
    )
    if "dtype" in wide:
        wide["dtype"] = torch.float64
    if "precision" in wide:
        wide["precision"] = "float64"
    return wide
