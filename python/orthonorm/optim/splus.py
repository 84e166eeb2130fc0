"""The optimizer SPlus."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import MatrixOptimizer
from .norms import to_signs
from .settings import Common, Rule, whole
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
from .state import Batch, Updates


class SPlus(MatrixOptimizer):
    """Sign of the momentum in the eigenbasis of Shampoo's preconditioner.

    W <- (1 - lr wd) W - lr 2/(m+n) Q_L sign(Q_L^T B Q_R) Q_R^T, B <- mu B + (1-mu) G.
    Q_L are eigenvectors of L <- beta2 L + (1-beta2) G G^T, Q_R of R, the same for G^T G.

    Args:
        params, lr, weight_decay, momentum, nesterov (False): as Muon.
        beta2: decay rate of L and R.
        precondition_frequency: steps between refreshes of the bases; the first step has one too.
        max_precond_dim: longer sides are not rotated.
        **common: options of every optimizer, see `settings.Common`.

    A basis is used from the step after its refresh on; the first step is along sign(B). The
    matrix-whitening study has the factor 2/(m+n) and decays by lr, as here. The authors' code (at
    75a63cf) multiplies step and decay by 1/(2 (m+n)): for theirs divide lr by 4, and multiply
    weight_decay by 2/(m+n). So the default lr, the study's 0.1, is their 0.4. For the authors'
    average of the weights use torch.optim.swa_utils; for their other rate of matrices with too long
    sides, a group of its own.
    State: `momentum_buffer`, `left_gram`, `right_gram`, `left_basis`, `right_basis`, `step`; in
    float32 4 bytes per parameter and 8 (m^2 + n^2) per matrix (float32 beside weights of 16 bits
    too).

    Source: arXiv:2506.07254, github.com/kvfrans/splus; the study is arXiv:2510.25000.
    """

    state_names = ("momentum_buffer",)
    counts_steps = True
    rules: ClassVar[dict[str, Rule]] = {
        "precondition_frequency": whole(1),
        "max_precond_dim": whole(0),
    }

    def __init__(
        self,
        params: Any,
        lr: Any = 0.1,
        weight_decay: Any = 0.01,
        momentum: float = 0.9,
        beta2: float = 0.999,
        precondition_frequency: int = 100,
        max_precond_dim: int = 10000,
        *,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        settings = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2, nesterov=nesterov,
            precondition_frequency=precondition_frequency, max_precond_dim=max_precond_dim,
        )  # fmt: skip
        super().__init__(params, settings, common)

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return side_shapes(x, group, "gram", "basis")

    def prepare(self, batch: Batch, group: dict[str, Any]) -> list[tuple[list[int], Any]]:
        """Return (indices, new averages and bases) per shape and step; {} if none is due."""
        found = []
        beta2, frequency = group["beta2"], group["precondition_frequency"]
        for indices, t in alike(batch):
            new: dict[str, Tensor] = {}
            if t == 1 or t % frequency == 0:
                old = [stacked([batch.state[f"{side}_gram"][i] for i in indices]) for side in SIDES]
                G = stacked([batch.grads[i] for i in indices])
                grams = averaged(old, side_grams(old, G), beta2, (1 - beta2, 1 - beta2))
                for side, A in zip(SIDES, grams, strict=True):
                    if A.numel():
                        new |= {f"{side}_gram": A, f"{side}_basis": eigenvectors(A)}
            found.append((indices, new))
        return found

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        super().update(batch, group)
        for indices, new in batch.prepared:
            for key, value in new.items():
                write_(batch.state[key], indices, value)
            if not new:
                average_(batch, indices, group["beta2"], 1 - group["beta2"])

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        bases = [bases_beside(updates, started(batch, f"{side}_basis")) for side in SIDES]
        triples = list(zip(updates.stacks, *bases, strict=True))
        turned = to_signs(Updates([between(left.mT, u, right) for u, left, right in triples]))
        pairs = zip(turned.stacks, triples, strict=True)
        return Updates([between(left, x, right.mT) for x, (_, left, right) in pairs])

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        return 2.0 / sum(x.shape[-2:])


def started(batch: Batch, key: str) -> list[Tensor]:
    """Return the bases; for matrices at their first step, the identity."""
    return [
        q if t > 1 else torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand(q.shape)
        for q, t in zip(batch.state[key], batch.steps, strict=True)
    ]
