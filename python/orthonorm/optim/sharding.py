"""Methods of rules for matrices that are cut across ranks (DTensors under FSDP2 or TP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..distributed.spread import Part, Spread, Sums, Travel, folded_size
from ..ops.normalize import accumulator
from ..ops.words import segments, triples_of
from ..polar import Polynomial
from .groups import Groups


class Sharding(Groups):
    """Ways to update a cut matrix. Every rule works by the default; the others send fewer bytes.

    default: parameter, gradient and all state travel to one rank, which computes as if alone.
    `self_contained`: `direction` reads updates, state, shapes and numbers, but neither batch.params
        nor batch.grads. Only updates then travel to that rank, and directions back.
    `elementwise`: a self-contained `direction` acts on every entry alone. Nothing travels. It gets
        the `elementwise_state` and steps of this rank's rows; `matrix_state` must be empty.
    `polar_first`, `after_polar`: with method="gram", ranks sum small Gram matrices instead. This is
        for rules whose `direction` is a polar factor and what follows from it.
    `by_lines`: the same for rules without a polar factor. `prepare` takes what it needs of a whole
        long side from Gram matrices, which it sums over `batch.spread`; `update` then acts on each
        line alone.
    """

    elementwise: ClassVar[bool] = False
    by_lines: ClassVar[bool] = False

    def iterates(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """True if the direction of `p` takes an iteration, which takes longer than sending it.

        Ranks that hold copies of `p` then share the work (distributed.share_work).
        """
        return False

    def polar_first(self, p: Tensor, group: dict[str, Any]) -> Polynomial | None:
        """Return the Newton-Schulz polynomial if `direction` is `after_polar` of its result.

        Return None for other rules.
        """
        return None

    def after_polar(self, parts: list[Part], spread: Spread, group: dict[str, Any]) -> Travel[None]:
        """Turn this rank's parts of polar factors into directions, in place."""
        yield from ()

    def sums(self, p: Tensor, group: dict[str, Any], step: int) -> Sums | None:
        """Return what step number `step` sums over ranks if p's long side is cut.

        None says that the rule cannot update it by sums. `comm_report` predicts bytes from the
        result, and the planner compares them with the bytes that an owner would receive.
        """
        polynomial = self.polar_first(p, group)
        if polynomial is None or polynomial.scale != "frobenius":
            return None
        times = len(segments(triples_of(polynomial.coefficients), polynomial.restarts))
        return Sums((folded_size(min(p.shape)) * accumulator(p).itemsize,) * times, norms=1)

    def on_shards(self, group: dict[str, Any]) -> bool:
        """True if ranks that hold parts of a matrix need its owner for the direction alone."""
        return self.self_contained and elementwise_end(group)

    def on_lines(self, group: dict[str, Any]) -> bool:
        """True if ranks that hold lines of a long side can update them themselves."""
        return self.by_lines and elementwise_end(group)


def elementwise_end(group: Mapping[str, Any]) -> bool:
    """True if the group's decay acts on every entry of W alone, and it has no constraint."""
    return group["decay"] in ("decoupled", "cautious") and group["constraint"] is None
