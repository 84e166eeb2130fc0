"""The optimizer SOAP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _checks as check
from ..distributed.spread import Sums, folded_size
from ..ops import rotated_adam_
from ..ops.normalize import accumulator
from .base import MatrixOptimizer
from .settings import Common, Rule, one_of, optional, whole
from .sides import (
    SIDES,
    average_,
    averaged,
    bases_beside,
    between,
    eigenvectors,
    side_grams,
    side_shapes,
)
from .stacks import alike, stacked, write_
from .state import Batch, Updates, by_step
from .tensors import is_distributed, numbers, sharded_dims


class Side(NamedTuple):
    """New state of one side of a matrix after a step; basis is None if no refresh is due."""

    gram: Tensor
    basis: Tensor | None = None
    order: Tensor | None = None  # indices of the old basis's vectors, in the order of the new one


class SOAP(MatrixOptimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner.

    W <- (1 - lr wd) W - lr c_t Q_L N Q_R^T, N = M / (sqrt(V) + eps), M and V Adam's averages of G'.
    G' = Q_L^T G Q_R. Q_L are eigenvectors of L <- beta L + (1-beta) G G^T, Q_R of R, the same for
    G^T G. c_t = sqrt(1-beta2^t) / (1-beta1^t).

    Args:
        params: parameters, named parameters or param groups (`split_params(model)` makes them).
        lr, betas, eps, weight_decay: as AdamW; decay is of the old weight (the authors decay the
            updated one).
        shampoo_beta: decay rate of L and R; None is betas[1].
        precondition_frequency: steps between refreshes of the bases.
        max_precond_dim: longer sides are not rotated.
        variant: "soap" (the authors' code): a refresh is one product with L and a QR, and V is
            sorted by the new order; eps is added to the uncorrected root. "study"
            (arXiv:2510.25000): a refresh is a new eigendecomposition, and V's entries keep their
            index; eps is added to the corrected root; bias correction counts the first step.
        method: for matrices whose long side is cut across ranks and not rotated (max_precond_dim).
            "auto" sends all to an owner; "gram" sums Gram matrices of the short side over ranks
            instead, if that sends less.
        **common: options of every optimizer, see `settings.Common`.

    The first step only computes L, R and their bases. L and R take in a gradient after it was used.
    The momentum is stored rotated; a refresh turns it into the new basis, which is exact.
    State: `exp_avg` (rotated), `exp_avg_sq`, `left_gram`, `right_gram`, `left_basis`,
    `right_basis`, `step`; 8 bytes per parameter in float32 and 8 (m^2 + n^2) per matrix
    (float32 beside weights of 16 bits too).

    Source: arXiv:2409.11321, github.com/nikhilvyas/SOAP.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    counts_steps = True
    by_lines = True
    rules: ClassVar[dict[str, Rule]] = {
        "shampoo_beta": optional(check.fraction),
        "precondition_frequency": whole(1),
        "max_precond_dim": whole(0),
        "variant": one_of("soap", "study"),
        "method": one_of("auto", "gram"),
    }

    def __init__(
        self,
        params: Any,
        lr: Any = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: Any = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        *,
        variant: str = "soap",
        method: str = "auto",
        **common: Unpack[Common],
    ) -> None:
        settings = dict(
            lr=lr, betas=betas, shampoo_beta=shampoo_beta, eps=eps, weight_decay=weight_decay,
            precondition_frequency=precondition_frequency, max_precond_dim=max_precond_dim,
            variant=variant, method=method,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return side_shapes(x, group, "gram", "basis")

    def prepare(self, batch: Batch, group: dict[str, Any]) -> list[tuple[list[int], list[Side]]]:
        """Return (indices, sides) per shape and step: new averages, and new bases if due.

        `sides` is empty if no basis is due and no other rank needed; `update` then averages.
        """
        chunks = list(alike(batch))
        found: list[tuple[list[int], list[Side]]] = []
        frequency, alone = group["precondition_frequency"], batch.spread is None
        due = [(t - 1) % frequency == 0 for _, t in chunks]
        wanted = [c for c, now in zip(chunks, due, strict=True) if now or not alone]
        grams_of = iter(self.new_grams(batch, wanted))
        for (indices, t), now in zip(chunks, due, strict=True):
            if alone and not now:
                found.append((indices, []))
                continue
            state = {key: stacked([values[i] for i in indices])
                     for key, values in batch.state.items() if key.startswith(SIDES)}  # fmt: skip
            old, beta = [state[f"{side}_gram"] for side in SIDES], shampoo_beta(group)
            grams = averaged(old, next(grams_of), beta, (1 - beta, 1 - beta))
            qr = t > 1 and group["variant"] == "soap"
            sides = [
                rebased(A, state[f"{side}_basis"], qr) if now and A.numel() else Side(A)
                for side, A in zip(SIDES, grams, strict=True)
            ]
            found.append((indices, sides))
        return found

    def new_grams(
        self, batch: Batch, chunks: list[tuple[list[int], int]]
    ) -> Iterable[list[Tensor]]:
        """Return [G G^T, G^T G] of each chunk; empty sides stay empty.

        If ranks hold parts of the matrices (`batch.spread`), the Grams are summed over ranks.
        """

        def of(indices: list[int]) -> list[Tensor]:
            sides = [[batch.state[f"{side}_gram"][i] for i in indices] for side in SIDES]
            return side_grams(
                [stacked(s) for s in sides], stacked([batch.grads[i] for i in indices])
            )

        made = (of(indices) for indices, _ in chunks)  # lazy: one chunk at a time is in memory
        if batch.spread is None:
            return made
        grams = [A for pair in made for A in pair]
        present = [i for i, A in enumerate(grams) if A.numel()]
        for i, A in zip(present, batch.spread.total([grams[i] for i in present]), strict=True):
            grams[i] = A
        return [grams[i : i + 2] for i in range(0, len(grams), 2)]

    def sums(self, p: Tensor, group: dict[str, Any], step: int) -> Sums:
        """Return what ranks sum: the short side's Gram and basis, stored in parts; half a new Gram.

        The new one is the gradient's.
        """
        k = min(p.shape)
        if k > group["max_precond_dim"]:
            return Sums(())
        size = accumulator(p).itemsize
        return Sums((2 * k * k * size, folded_size(k) * size))

    def check_shardings(self, group: Mapping[str, Any]) -> None:
        super().check_shardings(group)
        for i, p in enumerate(group["params"]):
            if group.get("method") != "gram" or not is_distributed(p) or p.dim() != 2:
                continue
            long, largest = max(p.shape), group["max_precond_dim"]
            cut = [p.placements[d].dim for d in sharded_dims(p)]
            if any(p.shape[d] > min(p.shape) for d in cut) and long <= largest:
                raise ValueError(
                    f"{self.name}: method='gram' must have max_precond_dim below {long}, the long "
                    f"side of parameter {self.label(group, i)}, which is cut along it: that side's "
                    f"factor needs the whole matrix; got {largest}"
                )

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        """Update weights, then averages and bases. Weights stay the same at their first step."""
        later = [i for i, t in enumerate(batch.steps) if t > 1]
        if later:
            super().update(batch.part(later), group)
        for indices, sides in batch.prepared:
            if sides:
                renew_(batch.state, indices, sides)
            else:
                average_(batch, indices, shampoo_beta(group), 1 - shampoo_beta(group))

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        bases = [bases_beside(updates, batch.state[f"{side}_basis"]) for side in SIDES]
        triples = list(zip(updates.stacks, *bases, strict=True))
        turned = Updates([between(left.mT, u, right) for u, left, right in triples])
        (beta1, beta2), study = group["betas"], group["variant"] == "study"
        lists = (batch.state["exp_avg"], batch.state["exp_avg_sq"], turned.matrices)
        for t, indices in by_step(batch.steps):
            s = t if study else t - 1
            M, V, X = ([values[i] for i in indices] for values in lists)
            corrections = [math.sqrt(1 - beta2**s), 1 / (1 - beta1**s)]
            root, size = numbers(corrections, X[0].device)
            sizes = (root * size).expand(len(indices))
            rotated_adam_.unchecked(M, V, X, beta1, beta2, group["eps"], sizes)
            if study:
                corrected_(X, M, V, root, size, group["eps"])
        pairs = zip(turned.stacks, triples, strict=True)
        return Updates([between(left, x, right.mT) for x, (_, left, right) in pairs])


def shampoo_beta(group: Mapping[str, Any]) -> float:
    """Return the decay rate of L and R."""
    given: float | None = group["shampoo_beta"]
    return group["betas"][1] if given is None else given


def corrected_(
    X: list[Tensor], M: list[Tensor], V: list[Tensor], root: Tensor, size: Tensor, eps: float
) -> None:
    """X <- size M / (sqrt(V) / root + eps): eps is added to the corrected root."""
    dtype = torch.promote_types(X[0].dtype, torch.float32)
    wide = [m.to(dtype) for m in M]
    roots = torch._foreach_sqrt([v.to(dtype) for v in V])
    torch._foreach_div_(roots, root)
    torch._foreach_add_(roots, eps)
    new = list(torch._foreach_div(wide, roots))
    if eps == 0:
        new = [torch.where(r == 0, 0.0, x) for x, r in zip(new, roots, strict=True)]
    torch._foreach_mul_(new, size)
    torch._foreach_copy_(X, new)


def rebased(A: Tensor, old: Tensor, qr: bool) -> Side:
    """Return a new basis of A: eigenvectors, or with `qr` one power step from the old basis."""
    if not qr:
        return Side(A, eigenvectors(A).to(old.dtype))
    A64, Q = A.double(), old.double()
    order = (Q * (A64 @ Q)).sum(-2).argsort(-1, descending=True)
    Q = Q.gather(-1, order.unsqueeze(-2).expand_as(Q))
    return Side(A, torch.linalg.qr(A64 @ Q).Q.to(old.dtype), order)


def renew_(batch_state: dict[str, list[Tensor]], indices: list[int], sides: list[Side]) -> None:
    """Write averages and bases; turn the momentum into the new basis, and sort V by its order."""
    for name, side, dim in zip(SIDES, sides, (-2, -1), strict=True):
        write_(batch_state[f"{name}_gram"], indices, side.gram)
        if side.basis is None:
            continue
        old, m, v = (
            stacked([batch_state[key][i] for i in indices])
            for key in (f"{name}_basis", "exp_avg", "exp_avg_sq")
        )
        turn = side.basis.double().mT @ old.double()
        m = turn @ m.double() if dim == -2 else m.double() @ turn.mT
        write_(batch_state["exp_avg"], indices, m)
        write_(batch_state[f"{name}_basis"], indices, side.basis)
        if side.order is not None:
            order = side.order.unsqueeze(-3 - dim).expand_as(v)
            write_(batch_state["exp_avg_sq"], indices, v.gather(dim, order))
