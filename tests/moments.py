"""What the tests of row, column and factored moments and norms share: inputs, layouts, a rule.

The rule for errors: against the reference run in float64, no output may be worse than twice the
reference run in the arithmetic of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from orthonorm._library import OPS, has_kernel
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MOMENTS = ("row_moment_", "column_moment_", "factored_moment_")
NORMS = ("row_normalize", "column_normalize")
EPS_AT = ("outside", "inside", "clamp")
EPS = (0.0, 1e-10, 1e-3, 0.3)  # the last two are larger than some denominators, smaller than others

compiled = pytest.mark.skipif(
    not has_kernel("row_moment_", "CPU"), reason="promised by the compiled kernels only"
)
moments = pytest.mark.parametrize("name", MOMENTS)
norms = pytest.mark.parametrize("name", NORMS)
places = pytest.mark.parametrize("eps_at", EPS_AT)


# ---- layouts -------------------------------------------------------------------------------------
def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def sliced(t: Tensor) -> Tensor:
    """Every second row and third column of something larger."""
    *batch, m, n = t.shape
    view = torch.full((*batch, 2 * m, 3 * n), 7.0, dtype=t.dtype)[..., ::2, ::3]
    return view.copy_(t)


def padded(t: Tensor) -> Tensor:
    """Contiguous rows, further apart than they are long."""
    *batch, m, n = t.shape
    view = torch.full((*batch, m, n + 3), 7.0, dtype=t.dtype)[..., :n]
    return view.copy_(t)


def permuted(t: Tensor) -> Tensor:
    """Batch dimensions that do not share one stride, inside the matrix dimensions."""
    return (
        t.permute(-2, *range(t.dim() - 2), -1).contiguous().permute(*range(1, t.dim() - 1), 0, -1)
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "transposed": transposed,
    "sliced": sliced,
    "padded": padded,
    "permuted": permuted,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(shape: Sequence[int], dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Gaussian, rows and columns of very different size, as momenta have them."""
    g = generator(seed)
    m, n = shape[-2:]
    x = torch.randn(*shape, generator=g, dtype=F64)
    x *= 10 ** torch.linspace(-2, 1, max(m, 1), dtype=F64)[:m, None]
    return (x * 10 ** torch.linspace(1, -1, max(n, 1), dtype=F64)[:n]).to(dtype)


def state(name: str, shape: Sequence[int], dtype: torch.dtype = F32, seed: int = 0) -> list[Tensor]:
    """The moments of `name` for a matrix of `shape`."""
    g = generator(seed + 1000)
    *batch, m, n = shape
    row = torch.rand(*batch, m, 1, generator=g, dtype=F64).to(dtype)
    column = torch.rand(*batch, 1, n, generator=g, dtype=F64).to(dtype)
    return {"row_moment_": [row], "column_moment_": [column]}.get(name, [row, column])


def lists(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[t] for t in tensors]


def updated(
    f: Any, tensors: Sequence[Tensor], *args: Any, to: torch.dtype | None = None
) -> list[Tensor]:
    """What f makes of copies of (moments..., X), in their own layout or in `to`."""
    copies = [t.to(to, copy=True) if to else like(t) for t in tensors]
    f(*lists(copies), *args)
    return copies


def like(t: Tensor) -> Tensor:
    """A copy with the same strides."""
    if t.numel() == 0:
        return t.clone()
    copy = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype)
    return copy.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)


# ---- the error rule ------------------------------------------------------------------------------
def assert_rule(got: Tensor, peer: Tensor, exact: Tensor, note: object) -> None:
    """Largest error at most twice the peer's; the oracle itself is worth 1e-15 of the output."""
    assert got.shape == exact.shape and got.dtype == peer.dtype, note
    if got.numel() == 0:
        return
    ours, theirs = ((t.double() - exact).abs().max().item() for t in (got, peer))
    assert ours <= 2 * theirs + 1e-15 * exact.abs().max().item(), (note, ours, theirs)


def check_moment(
    name: str, shape: Sequence[int], layout: str, dtypes: Sequence[torch.dtype], *args: Any
) -> None:
    dtype, state_dtype = dtypes
    x = LAYOUTS[layout](matrix(shape, dtype))
    tensors = [*state(name, shape, state_dtype), x]
    op = OPS[name]
    got, peer = updated(op, tensors, *args), updated(op.reference, tensors, *args)
    exact = updated(op.reference, tensors, *args, to=F64)
    for g, p, e in zip(got, peer, exact, strict=True):
        assert_rule(g, p, e, (name, shape, layout, dtypes, args))


def check_norm(
    name: str, shape: Sequence[int], layout: str, dtype: torch.dtype, *args: Any
) -> None:
    x = LAYOUTS[layout](matrix(shape, dtype))
    before = x.clone()
    op = OPS[name]
    got = op(x, *args)
    assert got.is_contiguous() and torch.equal(x, before)
    assert_rule(got, op.reference(x, *args), op.reference(x.double(), *args), (name, shape, layout))
