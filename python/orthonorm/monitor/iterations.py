"""Power iteration on a stream of rows, and power iteration within the range of a projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from ..ops.spectral import start_vector


class Projected(NamedTuple):
    """Result of `projected_power_iteration`: unit vector x, Rayleigh quotient, steps made."""

    x: Tensor
    value: Tensor
    steps: int


def projected_power_iteration(
    matrix: Tensor | Callable[[Tensor], Tensor],
    projection: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int = 30,
    tol: float = 0.0,
) -> Projected:
    """x <- P(V x) / |P(V x)|: power iteration that stays in the range of P (generative PCA).

    Args:
        matrix: symmetric V (n, n), such as a spiked or sample covariance, or a function x -> V x.
        projection: P, which maps R^n to the nearest point of a set: the range of a generator,
            sparse or non-negative vectors, a subspace. The identity gives plain power iteration.
        start: (n,), not in the null space of V. The paper takes the column of V with the largest
            diagonal entry.
        steps: most steps.
        tol: stop when |x - x_last| is at most this; 0 never stops early.

    Returns: x (n,), x^T V x, and the number of steps. Cost: a product and a projection per step.

    Raises: ValueError if P(V x) is 0.

    Source: arXiv:2203.09693.
    """
    name = "projected_power_iteration"
    check.tensor(name, "start", start, 1)
    check.integer(name, "steps", steps, 1)
    check.number(name, "tol", tol, 0.0)
    if isinstance(matrix, Tensor):
        check.tensor(name, "matrix", matrix)
        check.equal_shape(name, "matrix", matrix, (start.numel(), start.numel()))
        V = matrix
        product: Callable[[Tensor], Tensor] = lambda x: V @ x  # noqa: E731
    else:
        product = matrix
    x, made = start / torch.linalg.vector_norm(start), 0
    for made in range(1, steps + 1):
        y = projection(product(x))
        size = torch.linalg.vector_norm(y)
        if size == 0:
            raise ValueError(f"{name}: the projection of V x must not be 0, got 0 at step {made}")
        x, last = y / size, x
        if tol and torch.linalg.vector_norm(x - last) <= tol:
            break
    return Projected(x, x @ product(x), made)


class StreamingEigenvector:
    """v <- normalize(v + eta A_t^T (A_t v)): the top eigenvector of a stream's A^T A (block Oja).

    Rows arrive in blocks and are not kept. eta <= 1 / |A_t|_2^2 keeps a step from overshooting.
    `rate=None` takes 1 / (sum of |A_t|_F^2 so far), which falls as 1 / t and needs no tuning. v
    then comes close to the top eigenvector if sigma_1^2 >> sigma_2^2, which the paper assumes.

    Args:
        n: length of a row; blocks are (rows, n), v is (n,).
        rate: eta, or None.
        dtype, device: those of v.

    Cost: 4 rows n operations per update.

    Source: arXiv:2412.11963 (and its analysis of Oja's rule, which needs a gap R = Omega(log d)).
    """

    def __init__(
        self,
        n: int,
        rate: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        name = "StreamingEigenvector"
        check.integer(name, "n", n, 1)
        if rate is not None:
            check.number(name, "rate", rate, 0.0)
        self.rate = rate
        self.vector = start_vector(torch.empty(1, n, dtype=dtype, device=device)).to(dtype)
        self.total = torch.zeros((), dtype=torch.float64, device=device)  # sum of |A_t|_F^2

    def update(self, A: Tensor) -> Tensor:
        """Take a step on the rows A (rows, n); return the vector (n,), of length one."""
        name = "StreamingEigenvector"
        check.tensor(name, "A", A, 2)
        check.equal_shape(name, "A", A, (A.shape[0], self.vector.numel()))
        rows, v = A.detach().to(self.vector.dtype), self.vector
        self.total += rows.double().square().sum()
        rate = self.rate if self.rate is not None else 1 / self.total.clamp(min=1e-300)
        v = v + (rate * (rows.mT @ (rows @ v)).double()).to(v.dtype)
        self.vector = v / torch.linalg.vector_norm(v)
        return self.vector

    def value(self, A: Tensor) -> Tensor:
        """Return |A v|^2 / rows, the mean square of the rows A along the vector."""
        return (A.to(self.vector.dtype) @ self.vector).square().mean()
