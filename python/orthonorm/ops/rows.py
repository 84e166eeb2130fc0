"""Passes over some rows of every matrix of a list; transposed views make them columns.

`rows` are indices (..., k), int64, of different rows of each matrix. No host reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .normalize import accumulator
from .passes import decayed_update_


def entries(rows: Tensor, columns: int) -> Tensor:
    """Return `rows` as an index of `gather` and `scatter`, one per entry of the rows."""
    return rows.unsqueeze(-1).expand(*rows.shape, columns)


@op("accumulate_(Tensor(a!)[] sums, Tensor[] X, Tensor(b!)[] sizes) -> ()")
def accumulate_(sums: list[Tensor], X: list[Tensor], sizes: list[Tensor]) -> None:
    """S <- S + X; z_i <- sum_j |S_ij|, the sizes of the rows of the new S, as it is stored.

    Sizes are added up in float64.

    Shapes: S and X of entry i agree, (..., m, n); z is (..., m).
    """
    for s, x, z in zip(sums, X, sizes, strict=True):
        dtype = accumulator(s, x)
        s.copy_(s.to(dtype) + x.to(dtype))
        z.copy_(s.abs().sum(-1, dtype=torch.float64))


@op("take_rows_(Tensor(a!)[] X, Tensor[] rows, Tensor factor, Tensor(b!)[] out) -> ()")
def take_rows_(X: list[Tensor], rows: list[Tensor], factor: Tensor, out: list[Tensor]) -> None:
    """Y_i <- X_r and X_r <- factor X_r for r = rows_i: what is taken, and what is left of it.

    Shapes: X[i] is (..., m, n), rows[i] (..., k), out[i] (..., k, n).
    """
    for x, r, y in zip(X, rows, out, strict=True):
        index = entries(r, x.shape[-1])
        taken = x.gather(-2, index)
        dtype = accumulator(x)
        y.copy_(taken)
        x.scatter_(-2, index, (factor.to(dtype) * taken.to(dtype)).to(x.dtype))


@op(
    "update_rows_(Tensor(a!)[] params, Tensor[] rows, Tensor[] updates, Tensor lr, "
    "Tensor weight_decay, float[] factors) -> ()",
    composite=True,
)
def update_rows_(
    params: list[Tensor],
    rows: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    factors: list[float],
) -> None:
    """W <- (1 - lr weight_decay) W, and W_r <- W_r - lr factor U_i for r = rows_i.

    It is `decayed_update_` by a matrix whose other rows are zero. A kernel makes no such matrix.

    Shapes: W of entry i is (..., m, n), rows[i] (..., k), U (..., k, n).
    """
    for w, r, u, factor in zip(params, rows, updates, factors, strict=True):
        whole = torch.zeros(w.shape, dtype=u.dtype, device=u.device)
        whole.scatter_(-2, entries(r, w.shape[-1]), u)
        decayed_update_([w], [whole], lr, weight_decay, [factor])


def check_rows(name: str, rows: list[Tensor], **lists: list[Tensor]) -> None:
    """Check `rows` beside whole matrices and, second, their taken rows."""
    (whole, matrices), (some, taken) = lists.items()
    for label, values in lists.items():
        check.tensors(name, label, values, min_dim=2)
    if not isinstance(rows, (list, tuple)):
        raise TypeError(f"{name}: rows must be a list of tensors, got {type(rows).__name__}")
    for i, r in enumerate(rows):
        if not isinstance(r, Tensor) or r.dtype != torch.int64 or r.layout != torch.strided:
            got = f"{r.layout} {r.dtype}" if isinstance(r, Tensor) else type(r).__name__
            raise TypeError(f"{name}: rows[{i}] must be a dense int64 Tensor, got {got}")
    check.same_lengths(name, rows=rows, **lists)
    check.same_device(name, rows=rows, **lists)
    for i, (x, r, y) in enumerate(zip(matrices, rows, taken, strict=True)):
        *batch, m, n = x.shape
        if r.dim() != x.dim() - 1 or list(r.shape[:-1]) != batch or r.shape[-1] > m:
            raise ValueError(
                f"{name}: rows[{i}] must number at most {m} rows of each matrix of {whole}[{i}] "
                f"{check.shape(x)}, got shape {check.shape(r)}"
            )
        check.equal_shape(name, f"{some}[{i}]", y, (*r.shape, n))


@accumulate_.check
def _(sums: list[Tensor], X: list[Tensor], sizes: list[Tensor]) -> None:
    name = "accumulate_"
    check.tensors(name, "sums", sums, min_dim=2)
    check.tensors(name, "X", X, min_dim=2)
    check.tensors(name, "sizes", sizes)
    check.same_shapes(name, sums=sums, X=X)
    check.same_lengths(name, sums=sums, sizes=sizes)
    check.same_device(name, sums=sums, sizes=sizes)
    for i, (s, z) in enumerate(zip(sums, sizes, strict=True)):
        check.equal_shape(name, f"sizes[{i}]", z, s.shape[:-1])


@take_rows_.check
def _(X: list[Tensor], rows: list[Tensor], factor: Tensor, out: list[Tensor]) -> None:
    check_rows("take_rows_", rows, X=X, out=out)
    check.scalar("take_rows_", "factor", factor, X)


@update_rows_.check
def _(
    params: list[Tensor],
    rows: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    factors: list[float],
) -> None:
    name = "update_rows_"
    check_rows(name, rows, params=params, updates=updates)
    check.same_lengths(name, params=params, factors=factors)
    check.scalar(name, "lr", lr, params)
    check.scalar(name, "weight_decay", weight_decay, params)
