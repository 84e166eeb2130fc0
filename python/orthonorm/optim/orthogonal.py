"""Base of rules that orthogonalize: a group's Newton-Schulz settings, and polar factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .._polynomials import KELLER
from ..ops import newton_schulz, newton_schulz_
from ..ops.newton_schulz import FORMS, PRECISIONS
from ..polar import Polynomial, polynomial
from .base import MatrixOptimizer
from .settings import Common, Rule, one_of
from .state import Batch, Updates


class NewtonSchulz(Common, total=False):
    """Keyword arguments and group keys of rules that orthogonalize.

    ns_coefficients: a name of `orthonorm.coefficients.COEFFICIENTS`, one (a, b, c) or a list.
    ns_steps: iterations (None: as many as the coefficients' source runs).
    eps: lower clamp of the Frobenius norm; 0 makes the factor independent of the scale of G.
    method, precision, restarts: see `orthonorm.polar`.
    """

    ns_coefficients: Any
    ns_steps: int | None
    eps: float
    method: str
    precision: str
    restarts: Any


NEWTON_SCHULZ: dict[str, Any] = {
    "ns_coefficients": KELLER,
    "ns_steps": 5,
    "eps": 0.0,
    "method": "auto",
    "precision": "auto",
    "restarts": "auto",
}


class Orthogonalizing(MatrixOptimizer, abstract=True):
    """Base of rules whose direction comes from polar factors; NewtonSchulz has their settings."""

    rules: ClassVar[dict[str, Rule]] = {"method": one_of(*FORMS), "precision": one_of(*PRECISIONS)}

    def check_group(self, group: Mapping[str, Any]) -> None:
        self.polynomial(group)

    def iterates(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        return True

    def polynomial(self, group: Mapping[str, Any]) -> Polynomial:
        device = group["params"][0].device if group["params"] else None
        return polynomial(
            group["ns_coefficients"], group["ns_steps"], method=group["method"],
            restarts=group["restarts"], precision=group["precision"], device=device,
            name=self.name,
        )  # fmt: skip

    def polar(self, updates: Updates, group: Mapping[str, Any], keep: bool = False) -> Updates:
        """Return the polar factors of the updates; telemetry measures their nuclear norms.

        With `keep` they lie in new stacks. Without, on CPUs, they overwrite the updates, since
        there new memory costs more than passes over it.
        """
        probe = self.probe(group)
        found = self.iterated(updates, group, keep or probe is not None)
        if probe:
            probe.add_polar(updates, found)
        return found

    def iterated(self, updates: Updates, group: Mapping[str, Any], keep: bool = True) -> Updates:
        """Return polar factors as `polar`, but without telemetry: for other matrices than updates.

        `keep` is as in `polar`.
        """
        p = self.polynomial(group)
        how = (p.coefficients, p.restarts, group["method"], p.precision, p.scale, group["eps"])
        arguments = (updates.stacks, *how, p.safety, updates.norms)
        if keep or updates.stacks[0].device.type != "cpu":
            return Updates(newton_schulz.unchecked(*arguments))
        newton_schulz_.unchecked(*arguments)
        return Updates(updates.stacks)

    # ---- arguments of fused ops, which do a whole step ----------------------------------------

    def in_parts(self, group: dict[str, Any]) -> bool:
        """True if no fused op knows the settings: other momentum or decay, or telemetry."""
        return group["heavy_ball"] or group["decay"] != "decoupled" or bool(self.probe(group))

    def scheduled(self, batch: Batch, group: dict[str, Any]) -> tuple[Any, ...]:
        """Return a fused op's arguments lr, momentum, weight_decay and factors."""
        device = batch.params[0].device
        numbers = (self.scalar(group, "lr", device), self.momentum(group, device))
        return (*numbers, self.weight_decay(group, device), self.factors(batch, group))

    def iteration(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Return a fused op's arguments from `coefficients` to `safety`."""
        p = self.polynomial(group)
        how = (group["nesterov"], group["method"], p.precision, p.scale, group["eps"], p.safety)
        return (p.coefficients, p.restarts, *how)
