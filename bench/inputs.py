"""Inputs: matrices of named spectra, the other tensors that an op needs, and float64 copies.

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


# Functions of k that return k singular values; None: independent normal entries.
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
    """Return the same numbers in another memory layout.

    "transposed": the last two dimensions are swapped in memory. "reversed": all dimensions are, so
    batches are innermost. "sliced": rows are cut out of wider ones, and unaligned. "strided": every
    second element of the last two dimensions of a buffer.
    """
    if layout == "transposed" and t.dim() >= 2:
        return t.mT.contiguous().mT
    if layout == "reversed":
        backwards = tuple(reversed(range(t.dim())))
        return t.permute(backwards).contiguous().permute(backwards)
    if layout not in ("sliced", "strided") or t.dim() == 0:
        return t
    step = 2 if layout == "strided" else 1
    sides = [step * n + 3 if d >= t.dim() - 2 else n for d, n in enumerate(t.shape)]
    # gaps hold 7, so that a kernel that reads them gives wrong results
    buffer = torch.full(sides, 7.0, dtype=t.dtype, device=t.device)
    view = buffer
    for d in range(max(0, t.dim() - 2), t.dim()):
        view = view[(slice(None),) * d + (slice(1, 1 + step * t.shape[d], step),)]
    return view.copy_(t)


@dataclass(frozen=True)
class Inputs:
    """Maker of the tensors of one case, of a dtype, device, spectrum and layout."""

    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None  # None: the same as dtype
    device: str = "cpu"
    spectrum: str = "gaussian"
    layout: str = "contiguous"
    seed: int = 0
    scale: float = 1.0  # factor of results of `matrix`

    @classmethod
    def named(cls, dtype: str, **settings: Any) -> Inputs:
        """Return Inputs for a dtype by its name on the command line (also "mixed")."""
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
        """Return independent normal entries, drawn on the CPU in float32 (float64 if asked for)."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=self._generator(tag), dtype=wide)

    def orthogonal(self, tag: str, rows: int, columns: int) -> Tensor:
        """Return a matrix with orthonormal columns in float64."""
        return torch.linalg.qr(self.normal(tag, (rows, columns)).double())[0]

    def put(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in the dtype, on the device and in the layout of the case."""
        return place(t.to(self.device, dtype or self.dtype), self.layout)

    def matrix(self, tag: str, shape: Shape) -> Tensor:
        """Return a (batch of) matrices with the singular values of the spectrum, times `scale`."""
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
        """Return a first moment."""
        return self.put(self.normal(tag, shape), self.states)

    def moment(self, tag: str, shape: Shape) -> Tensor:
        """Return a second moment near 1.

        With a moment far from that of the data, a pass that divides by its root would take the
        matrix to denormals within a few dozen repeats.
        """
        return self.put(0.1 * self.normal(tag, shape).square() + 0.9, self.states)

    def unit(self, tag: str, shape: Shape) -> Tensor:
        """Return unit vectors along the last dimension."""
        return self.put(torch.nn.functional.normalize(self.normal(tag, shape), dim=-1))

    def basis(self, tag: str, shape: Shape) -> Tensor:
        """Return orthogonal matrices for the short side of `shape`, in the dtype of states."""
        batch, k = shape[:-2], min(shape[-2:])
        members = [self.orthogonal(f"{tag}.{i}", k, k) for i in range(math.prod(batch))]
        stack = torch.stack(members) if members else torch.empty(0, k, k)
        return self.put(stack.view(*batch, k, k), self.states)

    def number(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a scheduled number: a 0-d tensor on the device."""
        return torch.tensor(value, dtype=dtype, device=self.device)

    def numbers(self, values: Sequence[float]) -> Tensor:
        """Return one number per matrix of a list: a 1-D float64 tensor."""
        return torch.tensor(list(values), dtype=torch.float64, device=self.device)


def map_tensors(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """Apply `f` to every tensor of nested lists and dicts of arguments."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, (list, tuple)):
        return [map_tensors(v, f) for v in value]
    if isinstance(value, dict):
        return {k: map_tensors(v, f) for k, v in value.items()}
    return value


def storage(t: Tensor) -> Tensor:
    """Return the whole storage of a view as a 1-D tensor, with its gaps."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def copied(arguments: Arguments) -> Arguments:
    """Copy arguments to new storage; strides, offsets and the numbers in gaps stay the same."""

    def copy(t: Tensor) -> Tensor:
        return storage(t).clone().as_strided(t.shape, t.stride(), t.storage_offset())

    copies: Arguments = map_tensors(arguments, copy)
    return copies


def doubled(arguments: Arguments) -> Arguments:
    """Return the arguments of the oracle: the same numbers in float64, with float64 products."""
    wide: Arguments = map_tensors(
        arguments, lambda t: t.to(torch.float64 if t.is_floating_point() else t.dtype, copy=True)
    )
    if "dtype" in wide:
        wide["dtype"] = torch.float64
    if "precision" in wide:
        wide["precision"] = "float64"
    return wide
