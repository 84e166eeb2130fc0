"""Training of singular vectors: Cayley rotations (spectral adapters) and unit columns (SST)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import column_normalize
from ..ops.polar_iteration import LIFT, POLISH, STEPS
from ..polar import polar


class _Cayley(torch.autograd.Function):
    """Cayley's rotation and its gradient, from dR = -(I + R) dK (I + R) / 2, without inverses."""

    @staticmethod
    def forward(A: Tensor) -> Tensor:
        identity = torch.eye(A.shape[-1], dtype=torch.float64, device=A.device)
        lifts, polishes = STEPS[A.dtype]  # the steps of `polar_exact`, in one call of `polar`
        half = polar(
            identity - 0.5 * (A - A.mT), [LIFT] * lifts + [POLISH] * polishes, precision="full"
        )
        return (half @ half).to(A.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:
        (R,) = ctx.saved_tensors
        M = (torch.eye(R.shape[-1], dtype=R.dtype, device=R.device) + R).mT
        N = M @ G @ M
        return 0.25 * (N.mT - N)


def cayley_rotation(A: Tensor) -> Tensor:
    """R = (I - K) (I + K)^(-1) = msign(I - K)^2, K = (A - A^T) / 2: a rotation, I for A = 0.

    I - K commutes with its transpose, so its polar factor is (I - K) (I - K^2)^(-1/2), the square
    root of Cayley's transform. Newton-Schulz finds it by products alone, for a whole batch in one
    call. It computes in float64, because 19 steps in float32 lose twice what a solver loses. Twice
    differentiable.

    Args:
        A: (..., r, r), any square matrices; their symmetric parts do not matter.

    Returns: (..., r, r), in the dtype of A; NaN where A is not finite. Cost: 19 Newton-Schulz steps
    of r x r (36 for float64) and a product; two products in the backward.

    Raises: TypeError for what is not a floating-point tensor, ValueError for other shapes.

    Source: arXiv:2405.13952; github.com/pilancilab/spectral_adapter, SpectralLinearLayer_OFT.
    """
    op = "cayley_rotation"
    check.tensor(op, "A", A, min_dim=2)
    if A.shape[-2] != A.shape[-1]:
        raise ValueError(f"{op}: A must be square, got shape {check.shape(A)}")
    R: Tensor = _Cayley.apply(A.to(torch.promote_types(A.dtype, torch.float32)))
    return R.to(A.dtype)


def spectral_rotation(U: Tensor, s: Tensor, V: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """U R_A diag(s) R_B^T V^T, R = `cayley_rotation`: rotate the leading singular directions.

    A spectral adapter of W = U diag(s) V^T + rest trains A and B (and a factor in s). The adapted
    weight is this result plus the rest; for A = B = 0 it is W. Differentiable in all arguments.

    Args:
        U: (..., m, r), leading left singular vectors.
        s: (..., r), their singular values.
        V: (..., n, r), right singular vectors.
        A, B: (..., r, r), the trained parameters, zeros at the start.

    Returns: (..., m, n). Cost: one `cayley_rotation` of both, 2 r^2 (m + r) + 2 r m n operations.

    Raises: TypeError for what is not a floating-point tensor, ValueError for other shapes.

    Source: arXiv:2405.13952 (Spectral Adapter, rotation); github.com/pilancilab/spectral_adapter.
    """
    op = "spectral_rotation"
    for name, x in (("U", U), ("V", V), ("A", A), ("B", B)):
        check.tensor(op, name, x, min_dim=2)
    check.tensor(op, "s", s, min_dim=1)
    *batch, _, r = U.shape
    check.equal_shape(op, "s", s, (*batch, r))
    check.equal_shape(op, "V", V, (*batch, V.shape[-2], r))
    check.equal_shape(op, "A", A, (*batch, r, r))
    check.equal_shape(op, "B", B, (*batch, r, r))
    left, right = cayley_rotation(torch.stack([A, B])).unbind()
    return U @ ((left * s.unsqueeze(-2)) @ right.mT) @ V.mT


@torch.no_grad()
def renormalize_columns_(U: Tensor, columns: Tensor | None = None) -> Tensor:
    """U_:j <- U_:j / |U_:j|_2 for every column, or for j in `columns`: unit vectors again.

    Sparse Spectral Training keeps W = U diag(s) V^T factored. After each step it renormalizes the
    columns of U and V that it has sampled, and clamps s at 0 from below.

    Args:
        U: (..., m, r), changed in place and returned. A column of zeros stays.
        columns: int64 (k,), from 0 to r - 1, the same for every matrix of a batch.

    Cost: one pass over the columns, two more if `columns` is given.

    Raises: TypeError for what is not a floating-point tensor or indices that are not int64,
    ValueError for fewer dimensions and indices out of range, before anything is written.

    Source: arXiv:2405.15481 (SST).
    """
    op = "renormalize_columns_"
    check.tensor(op, "U", U, min_dim=2)
    if columns is None:
        return U.copy_(column_normalize(U))
    if not isinstance(columns, Tensor) or columns.dtype != torch.int64 or columns.dim() != 1:
        raise TypeError(f"{op}: columns must be a 1-D tensor of int64, got {columns!r}")
    last = U.shape[-1] - 1
    if len(columns) and not 0 <= columns.min() <= columns.max() <= last:
        raise ValueError(f"{op}: columns must be in [0, {last}], got {columns.tolist()}")
    return U.index_copy_(-1, columns, column_normalize(U.index_select(-1, columns)))
