"""K2, second moments and normalization: elementwise (rotated), per row, per column, factored.

All `_` ops work on lists of (batches of) matrices. States may have any floating dtype. Arithmetic
is in float32 (float64 if a tensor is), and results are rounded once. `eps_at` says how eps enters a
denominator, with s the root mean square (in `row_normalize` and `column_normalize` the scaled
norm): "outside": s + eps, "inside": sqrt(s^2 + eps), "clamp": max(s, eps). Zero over zero is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .scaling import norms_of

EPS_AT = ("outside", "inside", "clamp")


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of arithmetic on tensors: float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def inverse(mean_square: Tensor, eps: float, eps_at: str) -> Tensor:
    """Return 1 / sqrt(mean_square) with eps by `eps_at`, and 0 where the denominator is 0."""
    if eps_at == "inside":
        denominator = (mean_square + eps).sqrt()
    elif eps_at == "clamp":
        denominator = mean_square.sqrt().clamp(min=eps)
    else:
        denominator = mean_square.sqrt() + eps
    return torch.where(denominator == 0, 0.0, 1.0 / denominator)


@op(
    "rotated_adam_(Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor(c!)[] X, "
    "float beta1, float beta2, float eps, Tensor? scales=None) -> ()"
)
def rotated_adam_(
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    X: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    scales: Tensor | None = None,
) -> None:
    """X <- scale M / (sqrt(V) + eps), M <- beta1 M + (1-beta1) X, V <- beta2 V + (1-beta2) X^2.

    These are the elementwise moments of Conda and SOAP in the rotated basis. X holds the rotated
    gradient on entry, and the normalized rotated momentum on return. eps is added outside the root,
    without bias correction (arXiv:2509.24218, its code). `scales` (one number per entry of the
    list, float64 or float32) carries step size and bias correction; None means 1.

    Shapes: M, V and X of entry i agree; any number of dimensions.
    """
    for i, (m, v, x) in enumerate(zip(exp_avg, exp_avg_sq, X, strict=True)):
        dtype = accumulator(m, v, x)
        g = x.to(dtype)
        new_m = beta1 * m.to(dtype) + (1 - beta1) * g
        new_v = beta2 * v.to(dtype) + (1 - beta2) * g * g
        direction = new_m / (new_v.sqrt() + eps)
        if eps == 0:
            direction = torch.where(new_v == 0, 0.0, direction)
        if scales is not None:
            direction = direction * scales[i].to(dtype)
        m.copy_(new_m)
        v.copy_(new_v)
        x.copy_(direction)


@rotated_adam_.check
def _(
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    X: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    scales: Tensor | None = None,
) -> None:
    name = "rotated_adam_"
    check.tensors(name, "exp_avg", exp_avg)
    check.tensors(name, "exp_avg_sq", exp_avg_sq)
    check.tensors(name, "X", X)
    check.same_shapes(name, X=X, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check.fraction(name, "beta1", beta1)
    check.fraction(name, "beta2", beta2)
    check.number(name, "eps", eps, 0.0)
    if scales is not None:
        check.tensor(name, "scales", scales)
        check.equal_shape(name, "scales", scales, (len(X),))


@op(
    "elementwise_moment_(Tensor(a!)[] moments, Tensor(b!)[] X, float beta2, float eps, "
    "Tensor? corrections=None) -> Tensor"
)
def elementwise_moment_(
    moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    corrections: Tensor | None = None,
) -> Tensor:
    """V <- beta2 V + (1-beta2) X^2;  X <- X / (c sqrt(V) + eps);  returns |X|_F.

    It is AdaMuon's second moment of the polar factor X (Chongjie-Si/AdaMuon). `corrections` holds
    c = 1 / sqrt(1 - beta2^t), one number per tensor of the list (float64 or float32); None means 1.
    The norms are those of the new X before it is rounded, as `magnitude` measures.

    Shapes: V and X of entry i agree, (..., m, n); the norms are 1-D float64, one per matrix.
    """
    normalized = []
    for i, (v, x) in enumerate(zip(moments, X, strict=True)):
        dtype = accumulator(v, x)
        g = x.to(dtype)
        new_v = beta2 * v.to(dtype) + (1 - beta2) * g * g
        root = new_v.sqrt()
        if corrections is not None:
            root = root * corrections[i].to(dtype)
        denominator = root + eps
        out = torch.where(denominator == 0, 0.0, g / denominator)
        v.copy_(new_v)
        x.copy_(out)
        normalized.append(out)
    return norms_of(normalized)


@elementwise_moment_.check
def _(
    moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    corrections: Tensor | None = None,
) -> None:
    name = "elementwise_moment_"
    check.tensors(name, "X", X, min_dim=2)
    check.tensors(name, "moments", moments, min_dim=2)
    check.same_shapes(name, X=X, moments=moments)
    check.fraction(name, "beta2", beta2)
    check.number(name, "eps", eps, 0.0)
    if corrections is not None:
        check.tensor(name, "corrections", corrections)
        check.equal_shape(name, "corrections", corrections, (len(X),))


def _apply_moment(X: Tensor, x: Tensor, factor: Tensor, keep_norm: bool) -> None:
    """X <- x factor, rescaled to the Frobenius norm of x if `keep_norm` (0 stays 0)."""
    out = x * factor
    if keep_norm:
        before, after = (
            torch.linalg.vector_norm(t, dim=(-2, -1), keepdim=True, dtype=torch.float64)
            for t in (x, out)
        )
        out = out * torch.where(after == 0, 0.0, before / after).to(out.dtype)
    X.copy_(out)


@op(
    "row_moment_(Tensor(a!)[] moments, Tensor(b!)[] X, float beta2, float eps, "
    'str eps_at="outside", bool keep_norm=True) -> ()'
)
def row_moment_(
    moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    eps_at: str = "outside",
    keep_norm: bool = True,
) -> None:
    """v_i <- beta2 v_i + (1-beta2) mean_j X_ij^2;  X_ij <- X_ij / (sqrt(v_i) + eps), norm kept.

    It is NorMuon's row-wise (per output neuron) second moment (zichongli5/NorMuon). With
    `keep_norm` each matrix is rescaled to the Frobenius norm it had, so bias correction would
    cancel.

    Shapes: X[i] is (..., m, n), moments[i] is (..., m, 1).
    """
    for v, x in zip(moments, X, strict=True):
        if x.numel() == 0:
            continue
        dtype = accumulator(v, x)
        g = x.to(dtype)
        new_v = beta2 * v.to(dtype) + (1 - beta2) * g.square().mean(-1, keepdim=True)
        v.copy_(new_v)
        _apply_moment(x, g, inverse(new_v, eps, eps_at), keep_norm)


@op(
    "column_moment_(Tensor(a!)[] moments, Tensor(b!)[] X, float beta2, float eps, "
    'str eps_at="outside", bool keep_norm=True) -> ()'
)
def column_moment_(
    moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    eps_at: str = "outside",
    keep_norm: bool = True,
) -> None:
    """v_j <- beta2 v_j + (1-beta2) mean_i X_ij^2;  X_ij <- X_ij / (sqrt(v_j) + eps), norm kept.

    The per-column (per input feature) twin of `row_moment_`.

    Shapes: X[i] is (..., m, n), moments[i] is (..., 1, n).
    """
    for v, x in zip(moments, X, strict=True):
        if x.numel() == 0:
            continue
        dtype = accumulator(v, x)
        g = x.to(dtype)
        new_v = beta2 * v.to(dtype) + (1 - beta2) * g.square().mean(-2, keepdim=True)
        v.copy_(new_v)
        _apply_moment(x, g, inverse(new_v, eps, eps_at), keep_norm)


@op(
    "factored_moment_(Tensor(a!)[] row_moments, Tensor(b!)[] column_moments, Tensor(c!)[] X, "
    'float beta2, float eps, str eps_at="outside", bool keep_norm=True) -> ()'
)
def factored_moment_(
    row_moments: list[Tensor],
    column_moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    eps_at: str = "outside",
    keep_norm: bool = True,
) -> None:
    """X_ij <- X_ij / (sqrt(V_ij) + eps), V = r c^T / mean(r), r and c decayed row and column means.

    It is Adafactor's rank-one second moment: r_i <- beta2 r_i + (1-beta2) mean_j X_ij^2, and c_j in
    the same way over rows (arXiv:1804.04235). The code of arXiv:2510.25000 scales V by another
    length, which only changes its learning rate.

    Shapes: X[i] is (..., m, n), row_moments[i] is (..., m, 1), column_moments[i] is (..., 1, n).
    """
    for r, c, x in zip(row_moments, column_moments, X, strict=True):
        if x.numel() == 0:
            continue
        dtype = accumulator(r, c, x)
        g = x.to(dtype)
        square = g.square()
        new_r = beta2 * r.to(dtype) + (1 - beta2) * square.mean(-1, keepdim=True)
        new_c = beta2 * c.to(dtype) + (1 - beta2) * square.mean(-2, keepdim=True)
        mean_r = new_r.mean(-2, keepdim=True)
        ratio = torch.where(mean_r == 0, 0.0, new_r / mean_r)
        r.copy_(new_r)
        c.copy_(new_c)
        _apply_moment(x, g, inverse(ratio * new_c, eps, eps_at), keep_norm)


def check_moments(name: str, X: list[Tensor], **moments: list[Tensor]) -> None:
    """Check lists of moments of X: one number per row for "row_moments" and in `row_moment_`.

    Other moments have one number per column.
    """
    check.tensors(name, "X", X, min_dim=2)
    for label, values in moments.items():
        check.tensors(name, label, values, min_dim=2)
    check.same_lengths(name, X=X, **moments)
    check.same_device(name, X=X, **moments)
    for label, values in moments.items():
        rows = label == "row_moments" or (label == "moments" and name == "row_moment_")
        for i, (x, v) in enumerate(zip(X, values, strict=True)):
            wanted = (*x.shape[:-1], 1) if rows else (*x.shape[:-2], 1, x.shape[-1])
            check.equal_shape(name, f"{label}[{i}]", v, wanted)


def _check_moment(
    name: str, X: list[Tensor], beta2: float, eps: float, eps_at: str, **moments: list[Tensor]
) -> None:
    check_moments(name, X, **moments)
    check.fraction(name, "beta2", beta2)
    check.number(name, "eps", eps, 0.0)
    check.choice(name, "eps_at", eps_at, EPS_AT)


@row_moment_.check
def _(
    moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    eps_at: str = "outside",
    keep_norm: bool = True,
) -> None:
    _check_moment("row_moment_", X, beta2, eps, eps_at, moments=moments)


@column_moment_.check
def _(
    moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    eps_at: str = "outside",
    keep_norm: bool = True,
) -> None:
    _check_moment("column_moment_", X, beta2, eps, eps_at, moments=moments)


@factored_moment_.check
def _(
    row_moments: list[Tensor],
    column_moments: list[Tensor],
    X: list[Tensor],
    beta2: float,
    eps: float,
    eps_at: str = "outside",
    keep_norm: bool = True,
) -> None:
    _check_moment(
        "factored_moment_",
        X,
        beta2,
        eps,
        eps_at,
        row_moments=row_moments,
        column_moments=column_moments,
    )


def _normalize(X: Tensor, dim: int, scale: float, eps: float, eps_at: str) -> Tensor:
    if X.numel() == 0:
        return torch.empty_like(X, memory_format=torch.contiguous_format)
    x = X.double()  # squares of any float32 fit, so no scale of X overflows or vanishes
    peak = x.abs().amax(dim, keepdim=True) if X.dtype == torch.float64 else None
    unit = 1.0 if peak is None else torch.where(peak == 0, 1.0, peak)
    norm = torch.linalg.vector_norm(x / unit, dim=dim, keepdim=True) * unit * scale
    if eps_at == "inside":
        divisor = torch.hypot(norm, torch.full_like(norm, eps**0.5))
    else:
        divisor = norm.clamp(min=eps) if eps_at == "clamp" else norm + eps
    return torch.where(divisor == 0, 0.0, x / divisor).to(X.dtype).contiguous()


@op('row_normalize(Tensor X, float scale=1.0, float eps=0.0, str eps_at="outside") -> Tensor')
def row_normalize(
    X: Tensor, scale: float = 1.0, eps: float = 0.0, eps_at: str = "outside"
) -> Tensor:
    """X_ij / (scale |X_i|_2 + eps): every row (output neuron) to norm 1/scale; zero rows stay zero.

    scale = sqrt(n) gives Scion's normalized RowNorm; scale = 1/sqrt(n) divides by the row's RMS.

    Shapes: X is (..., m, n), the result too, contiguous.
    """
    return _normalize(X, -1, scale, eps, eps_at)


@op('column_normalize(Tensor X, float scale=1.0, float eps=0.0, str eps_at="outside") -> Tensor')
def column_normalize(
    X: Tensor, scale: float = 1.0, eps: float = 0.0, eps_at: str = "outside"
) -> Tensor:
    """X_ij / (scale |X_:j|_2 + eps): every column (input feature) to norm 1/scale; zeros stay zero.

    scale = 1/sqrt(m) gives Scion's ColNorm (divide by the column's RMS); scale = 1 gives SCALE's.

    Shapes: X is (..., m, n), the result too, contiguous.
    """
    return _normalize(X, -2, scale, eps, eps_at)


def _check_normalize(name: str, X: Tensor, scale: float, eps: float, eps_at: str) -> None:
    check.tensor(name, "X", X, min_dim=2)
    check.number(name, "scale", scale, 0.0)
    check.number(name, "eps", eps, 0.0)
    check.choice(name, "eps_at", eps_at, EPS_AT)


@row_normalize.check
def _(X: Tensor, scale: float = 1.0, eps: float = 0.0, eps_at: str = "outside") -> None:
    _check_normalize("row_normalize", X, scale, eps, eps_at)


@column_normalize.check
def _(X: Tensor, scale: float = 1.0, eps: float = 0.0, eps_at: str = "outside") -> None:
    _check_normalize("column_normalize", X, scale, eps, eps_at)
