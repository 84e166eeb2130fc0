"""Maps of singular values that bound the norms of weights: caps, clips, decays.

Each function takes a (batch of) matrices (..., m, n) and returns new ones in the same dtype. It has
no gradient and is made for use after an optimizer's step (`constraints.after_step`). sigma_i are
the singular values of W, and O = U V^T is its polar factor. Source unless said otherwise:
arXiv:2507.13338 (github.com/Arongil/lipschitz-transformers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..exact import polar_exact
from ..ops import gram_iteration, row_normalize
from ..ops import spectral_norm as top_triple
from ..ops.spectral import check_top_triple
from ..polar import odd_polynomial, polar

# Four odd quintics that approximate min(1, x) on [0, 3.4] to 0.034; modula/atom.py, same repository
HARD_CAP = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)
HARD_CAP_RANGE = 3.4
STEPS = 16  # default number of power steps


def _triple(op: str, W: Tensor, steps: int, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of `op`; return sigma_1 (..., 1, 1), u_1 (..., m, 1), v_1^T (..., 1, n).

    They are ready to broadcast.
    """
    check_top_triple(op, W, steps, start)
    sigma, u, v = top_triple(W, steps, start)
    return sigma[..., None, None], u.unsqueeze(-1), v.unsqueeze(-2)


@torch.no_grad()
def spectral_normalize(
    W: Tensor, cap: float = 1.0, steps: int = STEPS, start: Tensor | None = None
) -> Tensor:
    """W / max(1, sigma_1 / cap): the whole matrix shrinks where its norm exceeds the cap.

    Args:
        W: (..., m, n).
        cap: largest norm of the result, up to the error of sigma_1 after `steps` power steps.
        steps: power steps, one pass over W each.
        start: the first v, (..., n), not zero.

    Returns: (..., m, n). Cost: steps + 1 passes over W. Source: arXiv:2507.13338.
    """
    check.positive("spectral_normalize", "cap", cap)
    sigma, _, _ = _triple("spectral_normalize", W, steps, start)
    return (W / (sigma / cap).clamp(min=1.0)).to(W.dtype)


@torch.no_grad()
def spectral_hammer(
    W: Tensor, cap: float = 1.0, steps: int = STEPS, start: Tensor | None = None
) -> Tensor:
    """W + (cap - sigma_1) u_1 v_1^T: sigma_1 becomes the cap, even where it was smaller.

    A zero matrix has no u_1 and stays zero. Arguments, shapes and cost as `spectral_normalize`.
    Source: arXiv:2507.13338.
    """
    check.positive("spectral_hammer", "cap", cap)
    sigma, u, v = _triple("spectral_hammer", W, steps, start)
    return (W + (cap - sigma) * u * v).to(W.dtype)


@torch.no_grad()
def spectral_decay(
    W: Tensor, rate: float = 0.1, steps: int = STEPS, start: Tensor | None = None
) -> Tensor:
    """W - rate sigma_1 u_1 v_1^T: weight decay of the largest singular value alone.

    `rate` in [0, 1] is applied as given, without a learning rate (the repository's lambda, 0.1).
    Other arguments, shapes and cost as `spectral_normalize`. Source: arXiv:2507.13338.
    """
    check.number("spectral_decay", "rate", rate, 0.0, 1.0)
    sigma, u, v = _triple("spectral_decay", W, steps, start)
    return (W - rate * sigma * u * v).to(W.dtype)


def soft_cap_strength(cap: float, update: float, decay: float = 0.0) -> float:
    """a >= 0 for which x -> x - a x^3, then x + a x^3, sends cap (1 - decay) + update to the cap.

    Couples the soft cap to the learning rate. A matrix of norm at most `cap` that decays, and then
    moves by at most `update`, reaches a norm of at most k = cap (1 - decay) + update. The soft cap
    of this strength returns it to at most `cap`. t = a k^2 solves (1 - t) (1 + t (1 - t)^2) =
    cap / k, whose left side falls from 1 to 0. The map is monotone up to k = 1.3 cap; larger steps
    leave smaller singular values above the cap.

    Args:
        cap: largest singular value wanted, in units of W. To measure in units of a scale such as
            sqrt(m / n), divide W and `update` by it first. (The repository's JAX version does not,
            and is too weak for m > n.)
        update: largest singular value of the step, learning rate included.
        decay: weight decay times learning rate.

    Shapes: all are numbers. Cost: 60 bisections. Source: arXiv:2507.13338 (modula/atom.py).
    """
    op = "soft_cap_strength"
    check.positive(op, "cap", cap)
    check.number(op, "update", update, 0.0)
    check.number(op, "decay", decay, 0.0, 1.0)
    reached = cap * (1 - decay) + update
    if reached <= cap:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        t = (low + high) / 2
        above = (1 - t) * (1 + t * (1 - t) ** 2) > cap / reached
        low, high = (t, high) if above else (low, t)
    return high / reached**2


@torch.no_grad()
def soft_cap(W: Tensor, strength: float) -> Tensor:
    """sigma -> x + a x^3 with x = sigma - a sigma^3 and a = `strength`: two cubic odd polynomials.

    Shrinks all singular values a little, large ones more. `soft_cap_strength` couples a to the
    learning rate. Valid only for a sigma_1^2 < 1.

    Shapes: W is (..., m, n), the result too. Cost: 8 m n min(m, n) operations. Source:
    arXiv:2507.13338.
    """
    check.tensor("soft_cap", "W", W, min_dim=2)
    check.number("soft_cap", "strength", strength, 0.0)
    return odd_polynomial(W, [(1.0, -strength, 0.0), (1.0, strength, 0.0)])


@torch.no_grad()
def hard_cap(W: Tensor, cap: float = 1.0, method: str = "exact") -> Tensor:
    """sigma -> min(sigma, cap): W (I - T) + cap O T with T = (I + msign(O^T W - cap I)) / 2.

    Takes two polar factors, the second of the short side only. O^T W = V S V^T, so T projects onto
    the singular directions above the cap. Directions in which W is zero, where O is arbitrary, stay
    below the cap. The published form b O + W - (b O - W) msign(b O - W)^T O does not ensure that.

    Args:
        W: (..., m, n).
        cap: largest singular value of the result.
        method: "exact": correct to rounding, a few n eps sigma_1. "polynomial": four quintics on
            W / cap, off by at most 0.034 cap and above the cap by at most 0.011 cap. They hold up
            to 3.4 cap; matrices with a larger Gram bound are first divided down to it.

    Returns: (..., m, n). Cost: two `polar_exact`, the second of the short side; or four quintics
    and a `gram_iteration`. Source: arXiv:2507.13338; leloykun.github.io/ponder/spectral-clipping.
    """
    return _capped("hard_cap", W, cap, method)


def _capped(op: str, W: Tensor, cap: float, method: str) -> Tensor:
    """Check the arguments of `op`; return `hard_cap` of them."""
    check.tensor(op, "W", W, min_dim=2)
    check.positive(op, "cap", cap)
    check.choice(op, "method", method, ("exact", "polynomial"))
    if method == "exact":
        return _clipped(W, None, cap)
    bound = gram_iteration(W, 6)[..., None, None] / (HARD_CAP_RANGE * cap)
    X = W / (bound.clamp(min=1.0) * cap).to(W.dtype)
    return odd_polynomial(X, HARD_CAP).mul_(cap)


@torch.no_grad()
def spectral_clip(W: Tensor, low: float, high: float) -> Tensor:
    """sigma -> min(max(sigma, low), high), by three polar factors.

    Works as `hard_cap`, with a second projector. Where singular values of W are zero, the
    directions to raise to `low` are arbitrary, and some may be missed.

    Shapes: W is (..., m, n), the result too. Cost: three `polar_exact`. Source:
    leloykun.github.io/ponder/spectral-clipping.
    """
    op = "spectral_clip"
    check.tensor(op, "W", W, min_dim=2)
    check.number(op, "low", low, 0.0)
    check.number(op, "high", high, low)
    return _clipped(W, low, high)


def _clipped(W: Tensor, low: float | None, high: float) -> Tensor:
    """Return W with singular values clipped to [low, high]; low=None clips from above only."""
    tall = W.shape[-2] >= W.shape[-1]
    X = (W if tall else W.mT).to(torch.promote_types(W.dtype, torch.float32))
    Q = polar_exact(X).factor
    H = Q.mT @ X
    H = 0.5 * (H + H.mT)
    above = _positive_part(H, high)
    out = X - (X - high * Q) @ above
    if low is not None:
        # X + (low O - X) (I - T), where T projects onto sigma >= low: raises the others to low
        lift = low * Q - X
        out = out + lift - lift @ _positive_part(H, low)
    return (out if tall else out.mT).to(W.dtype).contiguous()


def _positive_part(H: Tensor, level: float) -> Tensor:
    """Return the projector onto eigenvectors of the symmetric H with eigenvalues above `level`."""
    identity = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    return 0.5 * (identity + polar_exact(H - level * identity).factor)


@torch.no_grad()
def clipped_decay(W: Tensor, rate: float, cap: float = 1.0, method: str = "exact") -> Tensor:
    """(1 - rate) W + rate hard_cap(W, cap): weight decay of the singular values above the cap.

    Between optimizer steps of norm eta, sigma_1 settles at cap + eta / rate after a step and at
    cap + (1 - rate) eta / rate after the decay. `method` as in `hard_cap`.

    Shapes: W is (..., m, n), the result too. Cost: that of `hard_cap`, and one pass.

    Source: leloykun.github.io/ponder/spectral-clipping.
    """
    op = "clipped_decay"
    check.number(op, "rate", rate, 0.0, 1.0)
    return torch.lerp(W, _capped(op, W, cap, method), rate)


@torch.no_grad()
def stiefel(W: Tensor, scale: float = 1.0, coefficients: object = "you6") -> Tensor:
    """sigma -> scale, approximately: scale times the polar factor O, by Newton-Schulz.

    Args:
        W: (..., m, n).
        scale: norm of the result; sqrt(m / n) gives it the RMS -> RMS norm 1.
        coefficients: as `polar`; "exact" takes `polar_exact`.

    Returns: (..., m, n). Cost: 6 Newton-Schulz steps, or a `polar_exact`. Source:
    arXiv:2507.13338.
    """
    check.tensor("stiefel", "W", W, min_dim=2)
    check.number("stiefel", "scale", scale)
    if coefficients == "exact":
        return polar_exact(W).factor.mul_(scale)
    return polar(W, coefficients, precision="full").mul_(scale)


@torch.no_grad()
def embed_cap(E: Tensor, inflation: float = 1.0) -> Tensor:
    """Rows x -> x / max(1 / inflation, RMS(x)): rows of RMS 1 / inflation or more get RMS 1.

    Smaller rows are multiplied by `inflation`. The map is a cap only for inflation = 1, which
    leaves rows of RMS below 1 unchanged.

    Args:
        E: (..., vocabulary, d), one embedding per row.
        inflation: largest factor.

    Returns: (..., vocabulary, d). Cost: one pass. Source: arXiv:2507.13338.
    """
    check.tensor("embed_cap", "E", E, min_dim=2)
    check.positive("embed_cap", "inflation", inflation)
    return row_normalize(E, E.shape[-1] ** -0.5, 1 / inflation, "clamp")
