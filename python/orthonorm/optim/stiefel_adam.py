"""StiefelAdam: X <- polar(X + X xi + lr P V (X^T X)), Adam for matrices of orthonormal columns.

X is d x k, d >= k, or its transpose. X xi is the step within the span of X, and
xi = lr Y^ / (sqrt(p) + eps) is skew. P V is the part of V / (sqrt(q) + eps) that is orthogonal to
the columns of X.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops import magnitude, newton_schulz_
from ..ops.normalize import accumulator
from ..polar import polynomial
from .base import MatrixOptimizer
from .settings import Common, Rule, number_below
from .stacks import alike, in_a_row, stacked
from .state import Batch
from .tensors import numbers

NAMES = ("skew", "skew_sq", "normal", "normal_sq")
STEPS = 12  # of Newton-Schulz: exact to rounding for singular values above 3e-4 |X|_F


class StiefelAdam(MatrixOptimizer):
    """Adam on matrices with orthonormal columns (rows, if there are fewer rows than columns).

    With A = X^T G, gY = (1-b)/2 (A - A^T), gV = G - X A, b = a/(a-1):
        Y <- beta1 Y - (1-beta1) gY, p <- beta2 p + (1-beta2) gY^2, Y^ = Y / (1-beta1^t),
        X' = X + X xi; under the roots p and q are divided by 1-beta2^t;
        V <- beta1 V + (1 - 3a/2) lr V Y - (1-beta1) gV, q <- beta2 q + (1-beta2) gV^2,
        D = V / (sqrt(q) + eps), P V = D - X' (X'^T X')^-1 X'^T D,
        V <- V - lr X' (P V)^T V, X <- polar(X' + lr P V (X'^T X')).

    Args:
        params: matrices or batches of them, of full rank; the first step makes them orthonormal. It
            raises for singular ones (zeros, a LoRA's B), which have no nearest orthonormal matrix.
            A step under torch.compile does not look, and makes NaN of them.
        lr: learning rate, a number or a one-element tensor.
        betas, eps: decay rates of the averages; eps is added to the roots.
        metric: a < 1; 1/2 is the canonical metric, 0 the Euclidean one.
        **common: options of every optimizer, see `settings.Common`. There is no weight decay.

    The step depends on the gradient's scale by lr V Y: V grows without bound and becomes NaN where
    lr sigma_1(Y) stays above 2 or so (gradients of 1e3 at the default lr). Clip such gradients.

    Square X has no V. As in the authors' code, V is not divided by 1-beta1^t, and xi acts by one
    Euler step (the default of their three choices). Their polar factor takes ten coupled iterations
    on X^T X, ours STEPS on X. Their wide matrices are transposed along the batch. Where gradient
    and averages are zero, X stays the same.
    State: `skew`, `skew_sq` (k x k), `normal`, `normal_sq` (d x k), `step`; 8 (d k + k^2) bytes per
    matrix in float32, 8 k^2 if it is square.

    Source: arXiv:2205.14173, github.com/konglk1203/VariationalStiefelOptimizer at 7959831b.
    """

    counts_steps = True
    decays = ("decoupled",)
    mantissas = False
    rules: ClassVar[dict[str, Rule]] = {"metric": number_below(1.0)}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-5,
        *,
        metric: float = 0.5,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, metric=metric), common)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        *batch, m, n = x.shape
        d, k = (0, 0) if m == n else (max(m, n), min(m, n))
        square = (*batch, min(m, n), min(m, n))
        return dict(zip(NAMES, (square, square, (*batch, d, k), (*batch, d, k)), strict=True))

    def prepare(self, batch: Batch, group: dict[str, Any]) -> None:
        """Raise for singular matrices at their first step; no other step waits for the device."""
        if torch.compiler.is_compiling():
            return
        for indices, t in alike(batch):
            if t > 1 or batch.params[indices[0]].numel() == 0:
                continue
            found = singular(stacked([batch.params[i] for i in indices]))
            bad = [batch.owners[i] for i, lost in zip(indices, found, strict=True) if lost]
            if bad:
                index = next(i for i, p in enumerate(group["params"]) if p is bad[0])
                raise ValueError(
                    f"{self.name}: matrices must have full rank at their first step, got a "
                    f"singular one for parameter {self.label(group, index)}"
                )

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        lr = self.scalar(group, "lr", batch.params[0].device)
        for indices, t in alike(batch):
            move_(batch.part(indices), t, lr, group)


def move_(batch: Batch, t: int, lr: Tensor, group: dict[str, Any]) -> None:
    """Update matrices of one shape and step number."""
    (beta1, beta2), eps, a = group["betas"], group["eps"], group["metric"]
    m, n = batch.params[0].shape[-2:]
    dtype, lr = accumulator(*batch.params), lr.to(accumulator(*batch.params))
    state = [batch.state[name] for name in NAMES]
    W, G, Y, p, V, q = (stacked(values).to(dtype) for values in (batch.params, batch.grads, *state))
    X, G = (W, G) if m >= n else (W.mT, G.mT)
    first, second = numbers([1 - beta1**t, 1 - beta2**t], W.device).to(dtype).unbind()
    A = X.mT @ G
    average_(Y, p, (A.mT - A).mul_((1 - a / (a - 1)) / 2), group)
    xi = direction(Y, p, second, eps).mul_(lr / first)
    moved = nonzero(G) | nonzero(xi)
    new = (X @ xi).add_(X)
    if m != n:
        turn = V @ ((1 - 1.5 * a) * lr * Y) if beta1 else 0.0
        average_(V, q, (X @ A).sub_(G), group)
        V += turn
        D = direction(V, q, second, eps)
        S = new.mT @ new
        # Not linalg.solve: batched LU from n = 200 fails once torch.set_num_threads(2) was called
        # (torch 2.13, oneMKL 2024.2: "pivots given to lu_solve"), and S is positive definite.
        D -= new @ torch.cholesky_solve(new.mT @ D, torch.linalg.cholesky_ex(S).L)
        V -= new @ (lr * (D.mT @ V))
        moved = moved | nonzero(D)
        new += D @ (lr * S)
    new = torch.where(moved, retracted(new), X)
    torch._foreach_copy_(batch.params, list((new if m >= n else new.mT).unbind()))
    for tensors, value in zip(state, (Y, p, V, q), strict=True):
        if tensors[0].dtype != dtype or not in_a_row(tensors):  # else `value` is their memory
            torch._foreach_copy_(tensors, list(value.unbind()))


def singular(W: Tensor) -> list[bool]:
    """Return which entries have a finite matrix of sigma_min <= 8 eps sigma_1: the host waits."""
    W = W.to(accumulator(W))
    finite = W.isfinite().flatten(-2).all(-1)
    sigma = torch.linalg.svdvals(torch.where(finite[..., None, None], W, 1.0))
    low = sigma[..., -1] <= 8 * torch.finfo(W.dtype).eps * sigma[..., 0]
    return (low & finite).view(len(W), -1).any(1).tolist()


def retracted(X: Tensor) -> Tensor:
    """Overwrite X by polar(X), and return it."""
    p = polynomial("polar_express", STEPS, precision="full")
    how = (p.coefficients, p.restarts, "auto", p.precision, p.scale, 0.0, p.safety)
    newton_schulz_.unchecked([X], *how)
    return X


def average_(mean: Tensor, square: Tensor, descent: Tensor, group: dict[str, Any]) -> None:
    """Average the descent, minus the slope, and its square; it is overwritten."""
    beta1, beta2 = group["betas"]
    # not addcmul_, nor add_ with alpha: torch.compile rounds their products separately or in
    # another order (torch 2.13; 2.11)
    mean.mul_(beta1).sub_(descent, alpha=beta1 - 1)
    square.mul_(beta2).sub_(descent.square_(), alpha=beta2 - 1)


def direction(mean: Tensor, square: Tensor, correction: Tensor, eps: float) -> Tensor:
    """Return mean / (sqrt(square / correction) + eps), and 0 where that is 0 / 0."""
    below = (square / correction).sqrt_().add_(eps)
    if eps > 0:
        return torch.div(mean, below, out=below)
    return torch.where(below == 0, 0.0, mean / below)


def nonzero(x: Tensor) -> Tensor:
    """Return for each matrix whether an entry is not 0, shape (..., 1, 1)."""
    return (magnitude.unchecked([x]) != 0).view(*x.shape[:-2], 1, 1)
