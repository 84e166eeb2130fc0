"""Dao-AILab/gram-newton-schulz: its orthogonalizer on these kernels.

    from orthonorm.compat.gram_newton_schulz import GramNewtonSchulz

Source: https://github.com/Dao-AILab/gram-newton-schulz.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _checks as check
from ..coefficients import COEFFICIENTS
from ..ops import magnitude, newton_schulz
from ..polar import polynomial

__all__ = [
    "POLAR_EXPRESS_COEFFICIENTS",
    "YOU_COEFFICIENTS",
    "GramNewtonSchulz",
]

POLAR_EXPRESS_COEFFICIENTS = [list(triple) for triple in COEFFICIENTS["polar_express"].steps(5)]
YOU_COEFFICIENTS = [list(triple) for triple in COEFFICIENTS["you5"].steps(5)]


class GramNewtonSchulz:
    """f(X / (|X|_F + ns_epsilon)), f the given triples; on the Gram matrix where that is faster.

    Args:
        ns_epsilon: added to the norm.
        ns_use_kernels: has no effect here.
        ns_coefficients: (a, b, c) per iteration; None: POLAR_EXPRESS_COEFFICIENTS.
        use_gram_newton_schulz: False iterates on X itself.
        gram_newton_schulz_reset_iterations: iterations before which the Gram form starts anew from
            X; None takes the fewest that are safe. Positions that are known to blow up are refused
            with ValueError.
        compile_kwargs: has no effect here.

    Call it with a matrix or a batch (..., m, n), which it does not modify. The result has the same
    dtype. It iterates in float16, as the original; on CPUs in float32.
    """

    def __init__(
        self,
        ns_epsilon: float = 1e-7,
        ns_use_kernels: bool = True,
        ns_coefficients: Sequence[Sequence[float]] | None = None,
        use_gram_newton_schulz: bool = True,
        gram_newton_schulz_reset_iterations: Sequence[int] | None = None,
        compile_kwargs: Any = None,
    ) -> None:
        check.number("GramNewtonSchulz", "ns_epsilon", ns_epsilon, 0.0)
        self.ns_epsilon = ns_epsilon
        self.ns_coefficients = ns_coefficients or POLAR_EXPRESS_COEFFICIENTS
        self.method = "auto" if use_gram_newton_schulz else "direct"
        resets = gram_newton_schulz_reset_iterations
        self.restarts: Any = "auto" if resets is None else [r for r in resets if r > 0]

    def __call__(self, X: Tensor) -> Tensor:
        check.tensor("GramNewtonSchulz", "X", X, min_dim=2)
        p = polynomial(
            self.ns_coefficients, method=self.method, restarts=self.restarts, device=X.device,
            precision="full" if X.device.type == "cpu" else "auto", name="GramNewtonSchulz",
        )  # fmt: skip
        norms = magnitude([X]) + self.ns_epsilon
        return newton_schulz(
            [X], p.coefficients, p.restarts, self.method, p.precision, norms=norms
        )[0]
