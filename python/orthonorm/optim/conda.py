"""Conda: Adam with moments in a one-sided singular basis of the momentum, refreshed rarely."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..distributed.spread import Sums, folded_size
from ..ops import conda_step_
from ..ops.normalize import accumulator
from ..ops.rotations import rotated, rotated_back
from ..ops.scaling import divide, frobenius
from .base import MatrixOptimizer
from .settings import Common, Rule, at_least, one_of, whole
from .stacks import alike, stacked, write_
from .state import Batch
from .tensors import numbers


class Conda(MatrixOptimizer):
    """W <- W - lr s c_t Q N, N = M / (sqrt(V) + eps), M and V Adam's averages of Q^T G.

    Q has the singular vectors of the momentum's short side, and is recomputed every
    `update_proj_gap` steps. For rows >= columns it acts from the right: G Q and N Q^T.
    c_t = sqrt(1-beta2^t) / (1-beta1^t). The momentum is stored rotated, which is exact while Q
    stays the same and leaves two products a step. V is elementwise. At a refresh its entries keep
    their index (the k-th largest direction). It is not bias-corrected under the root.

    Args:
        params: parameters, named parameters or param groups (`split_params(model)` makes them).
        lr: learning rate of matrices and of the companion, a number or a one-element tensor.
        betas, eps: of the averages; eps is added to sqrt(V).
        weight_decay: decoupled, applied to the updated weight with the raw lr.
        update_proj_gap: steps between refreshes of Q (at steps 1, 1 + gap, ...).
        scale: factor s on matrix updates (the authors' runs use 0.25).
        method: for matrices whose long side is cut across ranks. "auto" sends all to an owner;
            "gram" sums Gram matrices over ranks instead, if that sends less.
        **common: options of every optimizer, see `settings.Common`; here `adamw` also has lr,
            betas, eps and weight_decay of this optimizer, unless it sets others.

    State of a matrix: `exp_avg` (rotated), `exp_avg_sq`, `basis`, and `step`, an int; 8 bytes per
    parameter in float32, and 4 per entry of the basis (float32 beside weights of 16 bits too).

    Source: arXiv:2509.24218 and its code, github.com/jie040109/Conda.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    counts_steps = True
    companion: ClassVar[dict[str, Any]] = {"decay_first": False, "correct_eps": False}
    decays = ("decoupled",)
    mantissas = False
    by_lines = True
    rules: ClassVar[dict[str, Rule]] = {"update_proj_gap": whole(1), "scale": at_least(0.0),
             "method": one_of("auto", "gram")}  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Any = 0.0,
        *,
        update_proj_gap: int = 2000,
        scale: float = 0.25,
        method: str = "auto",
        **common: Unpack[Common],
    ) -> None:
        shared = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        settings = dict(shared, update_proj_gap=update_proj_gap, scale=scale, method=method)
        super().__init__(params, settings, common, shared)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        k = min(x.shape[-2:])
        return {"basis": (*x.shape[:-2], k, k)}

    def prepare(self, batch: Batch, group: dict[str, Any]) -> list[tuple[list[int], Tensor]]:
        """Return (indices, new bases) of the matrices whose refresh is due, by shape."""
        momenta, bases = batch.state["exp_avg"], batch.state["basis"]
        due, grams, gap = [], [], group["update_proj_gap"]
        for indices in (indices for indices, t in alike(batch) if (t - 1) % gap == 0):
            Q, M, G = (stacked([values[i] for i in indices])
                       for values in (bases, momenta, batch.grads))  # fmt: skip
            due.append(indices)
            grams.append(momentum_gram(Q, M, G, group["betas"][0], batch.spread is None))
        if batch.spread is not None:
            grams = batch.spread.total(grams)
        dtypes = [bases[indices[0]].dtype for indices in due]
        return [(r, eigenbasis(A).to(d)) for r, A, d in zip(due, grams, dtypes, strict=True)]

    def sums(self, p: Tensor, group: dict[str, Any], step: int) -> Sums:
        """Return what ranks sum: the basis, stored in parts; at a refresh, half of the Gram matrix.

        The Gram matrix is the momentum's.
        """
        k, due = min(p.shape), (step - 1) % group["update_proj_gap"] == 0
        return Sums((k * k * accumulator(p).itemsize, *([folded_size(k) * 8] * due)))

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        momenta, bases = batch.state["exp_avg"], batch.state["basis"]
        for indices, new in batch.prepared:
            old, m = (stacked([values[i] for i in indices]) for values in (bases, momenta))
            write_(momenta, indices, turned(m, old, new))
            write_(bases, indices, new)
        device = batch.params[0].device
        lr = self.scalar(group, "lr", device)
        corrections = [
            math.sqrt(1 - beta2**t) / (1 - beta1**t) * group["scale"] for t in batch.steps
        ]
        scales = lr * numbers(corrections, device)
        bases = [q.to(m.dtype) for q, m in zip(bases, momenta, strict=True)]
        conda_step_.unchecked(
            batch.params, batch.grads, momenta, batch.state["exp_avg_sq"], bases, scales, lr,
            beta1, beta2, group["eps"], self.weight_decay(group, device),
        )  # fmt: skip


def momentum_gram(
    basis: Tensor, momentum: Tensor, grad: Tensor, beta1: float, scaled: bool
) -> Tensor:
    """Return the Gram matrix of X = beta1 M + (1-beta1) G on the short side, in float64.

    M is the momentum, turned back from `basis`. With `scaled` it is that of X / |X|_F, so that no
    square of a float64 overflows.
    """
    M = rotated_back(momentum.double(), basis.double())  # both are zero at the first step
    X = beta1 * M + (1 - beta1) * grad.double()
    X = divide(X, frobenius(X), torch.float64) if scaled else X
    return X.mT @ X if X.shape[-2] >= X.shape[-1] else X @ X.mT


def eigenbasis(A: Tensor) -> Tensor:
    """Return eigenvectors by descending eigenvalue; for a matrix that is not finite, the identity.

    `eigh` would raise for it, and its update is not finite anyway.
    """
    finite = A.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.eigh(torch.where(finite, A, identity)).eigenvectors.flip(-1)


def turned(momentum: Tensor, basis: Tensor, new: Tensor) -> Tensor:
    """Turn M from coordinates of `basis` into those of `new`, in float64."""
    return rotated(momentum.double(), basis.double().mT @ new.double())
