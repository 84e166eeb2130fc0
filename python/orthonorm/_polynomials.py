"""x <- x(a + bx^2 + cx^4): the effect of a schedule on a singular value, exact and with rounding.

Computes from the triples, in plain Python: image, slope, the condition and the best restarts of the
Gram form, and the Polar Express schedule. `coefficients.py` has the published schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from types import MappingProxyType
from typing import Literal

Triple = tuple[float, float, float]
Triples = tuple[Triple, ...]
PastEnd = Literal["repeat_last", "cycle", "error"]
Prescale = Literal["frobenius", "aol"]
Form = Literal["direct", "gram"]

KELLER: Triple = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/
# x (15 - 10 x^2 + 3 x^4) / 8 cubes the distance of x to 1, up to a factor; arXiv:2409.20325
CUBING: Triple = (1.875, -1.25, 0.375)

# Unit roundoff of the type that stores X (direct form) or R, Q and Z (Gram form).
ROUNDOFF: Mapping[str, float] = MappingProxyType(
    {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
)
# Lowest eigenvalue of XX^T after float16 rounding: the default of gram-newton-schulz.
LAMBDA_MIN = -4e-4
BLOWUP = 1e8  # that package's search refuses restarts with this condition or more


# ---- arguments -----------------------------------------------------------------------------------
def _sequence(value: object) -> tuple[object, ...]:
    """Return a sequence as a tuple; raise TypeError for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(
            "coefficients: must be a name, an (a, b, c) triple, a list of triples or Coefficients, "
            f"got {type(value).__name__}"
        )
    return tuple(value)


def _triples(value: object) -> Triples:
    """Return 1 to 99 finite triples of floats; raise TypeError or ValueError for anything else."""
    out: list[Triple] = []
    for item in _sequence(value):
        numbers = [float(v) for v in _sequence(item) if isinstance(v, Real)]
        if len(numbers) != len(_sequence(item)):
            raise TypeError(f"coefficients: a triple must hold numbers, got {item!r}")
        if len(numbers) != 3:
            raise ValueError(f"coefficients: a triple must be (a, b, c), got {item!r}")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"coefficients: a triple must be finite, got {item!r}")
        out.append((numbers[0], numbers[1], numbers[2]))
    if not 1 <= len(out) < 100:
        raise ValueError(f"coefficients: there must be 1 to 99 triples, got {len(out)}")
    return tuple(out)


def _check_steps(steps: int) -> None:
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(f"coefficients: steps must be an int, got {steps!r}")
    if not 1 <= steps < 100:
        raise ValueError(f"coefficients: steps must be in [1, 99], got {steps}")


def _restarts(restarts: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return the restarts as a tuple; raise ValueError unless they increase within [1, steps - 1].

    Restart r happens before iteration r, counted from 0.
    """
    out = tuple(restarts)
    if not all(u < v for u, v in zip((0, *out), (*out, steps), strict=True)):
        raise ValueError(f"coefficients: restarts must increase within [1, {steps - 1}], got {out}")
    return out


def _check_lambda(lambda_min: float) -> None:
    if not -1 < lambda_min <= 0:
        raise ValueError(f"coefficients: lambda_min must be in (-1, 0], got {lambda_min}")


def _choice(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"coefficients: {what} must be one of {', '.join(allowed)}, got {value!r}")


# ---- the effect on one singular value ------------------------------------------------------------
def evaluate(triples: Sequence[Triple], x: float) -> float:
    """Return f(x) of the composed odd polynomial; +-inf where it overflows."""
    for t in _triples(triples):
        x = _polynomial(t, x)
    return x


def slope(triples: Sequence[Triple]) -> float:
    """Return f'(0), the product of all a."""
    return math.prod(t[0] for t in _triples(triples))


def image(triples: Sequence[Triple], low: float = 1e-3, high: float = 1.0) -> tuple[float, float]:
    """Return (min f, max f) over [low, high], exact up to rounding; infinite where f overflows.

    A continuous map takes an interval to the interval between its extremes. Each step is therefore
    mapped exactly, from its ends and critical points; a grid could miss a narrow peak.
    """
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"coefficients: image needs finite low <= high, got [{low}, {high}]")
    return _image(_triples(triples), low, high, 0.0)


def _image(triples: Triples, low: float, high: float, rounding: float) -> tuple[float, float]:
    """Return the image if every value, also the input, may be off by a factor 1 +- rounding."""

    def grow(x: float) -> float:
        return math.copysign(rounding, x)

    low, high = low * (1 - grow(low)), high * (1 + grow(high))
    for a, b, c in triples:
        roots: list[float] = []  # y = x^2 with p'(x) = a + 3b y + 5c y^2 = 0, no cancellation
        if (d := 9 * b * b - 20 * a * c) >= 0:
            q = -(3 * b + math.copysign(math.sqrt(d), b)) / 2
            roots = [y for y in (q / (5 * c) if c else 0.0, a / q if q else 0.0) if y > 0]
        points = [low, high, *(s * math.sqrt(y) for y in roots for s in (-1, 1))]
        values = [_polynomial((a, b, c), x) for x in points if low <= x <= high]
        low, high = min(values), max(values)
        low, high = low * (1 - grow(low)), high * (1 + grow(high))
    return low, high


def _polynomial(t: Triple, x: float) -> float:
    a, b, c = t
    if abs(x) > 1e60:  # the leading term only, to avoid inf - inf and 0 * inf
        return c * x * x * x * x * x if c else b * x * x * x if b else a * x if a else 0.0
    y = x * x
    return x * (a + y * (b + y * c))


# ---- the effect of rounding in the Gram form -----------------------------------------------------
def gram_condition(
    triples: Sequence[Triple], restarts: Sequence[int] = (), lambda_min: float = LAMBDA_MIN
) -> float:
    """max over iterations t of max_x |q_t| / min_x |q_t|, where r_0 = x^2 + lambda_min, q = 1.

    The criterion of gram-newton-schulz's restart search (restart_autotune.py, stability_metric).
    Rounding makes R = XX^T indefinite, so each eigenvalue is shifted by lambda_min < 0. It follows
    z = a + br + cr^2, q <- qz, r <- rz^2; a restart sets x <- qx, r <- x^2 + lambda_min, q <- 1.
    Q multiplies rounding errors by up to this condition. x runs over a logarithmic grid of 400
    points per decade, down to where x^2 is far below |lambda_min| (in that package: 10,000 points
    in [1e-10, 1]).
    """
    triples = _triples(triples)
    _check_lambda(lambda_min)
    return _gram_condition(triples, _restarts(restarts, len(triples)), float(lambda_min))


@lru_cache(maxsize=512)
def _gram_condition(triples: Triples, restarts: tuple[int, ...], lambda_min: float) -> float:
    x, worst = _grid(lambda_min), 1.0
    for start, end in zip((0, *restarts), (*restarts, len(triples)), strict=True):
        segment = list(_conditions(x, triples[start:end], lambda_min))
        worst = max(worst, *(condition for condition, _ in segment))
        if worst == math.inf:
            return worst
        x = _times(segment[-1][1], x)
    return worst


@lru_cache(maxsize=8)
def _grid(lambda_min: float) -> list[float]:
    decades = max(5.0, 3 - math.log10(-lambda_min) / 2) if lambda_min else 10.0
    count = round(400 * decades)
    return [10 ** (-decades * i / (count - 1)) for i in range(count)]


def _times(u: list[float], v: list[float]) -> list[float]:
    return [a * b for a, b in zip(u, v, strict=True)]


def _conditions(
    x: list[float], triples: Triples, lambda_min: float
) -> Iterator[tuple[float, list[float]]]:
    """Yield (condition of Q, Q) after each iteration from Q = I; stop at an infinite condition."""
    r, q = [v * v + lambda_min for v in x], [1.0] * len(x)
    for a, b, c in triples:
        z = [a + v * (b + v * c) for v in r]
        q, r = _times(q, z), _times(_times(r, z), z)
        top, bottom = max(map(abs, q)), min(map(abs, q))
        if not (bottom > 0 and top < 1e150):  # for larger q, r = (qx)^2 overflows
            yield math.inf, q
            return
        yield top / bottom, q


def best_restarts(
    triples: Sequence[Triple], count: int = 1, *, lambda_min: float = LAMBDA_MIN
) -> tuple[int, ...]:
    """Return the `count` restarts 1 <= r < steps of least gram_condition (the first of equal ones).

    A restart before iteration r, counted from 0, sets X <- QX, R <- XX^T, Q <- I. Raise ValueError
    if every choice has a condition of 1e8 or more, as the original search does: then more restarts
    are needed.
    """
    triples = _triples(triples)
    _check_lambda(lambda_min)
    if not 0 <= count < len(triples):
        raise ValueError(f"coefficients: count must be in [0, {len(triples)}), got {count}")
    best = _search(triples, count, float(lambda_min))
    if best is None:
        raise ValueError(
            f"coefficients: these {len(triples)} steps need more restarts, got count={count}"
        )
    return best


@lru_cache(maxsize=512)
def _search(triples: Triples, count: int, lambda_min: float) -> tuple[int, ...] | None:
    """Return the best `count` restarts, or None if all reach BLOWUP.

    Depth-first search in lexicographic order. The maximum can only grow along a branch, so the best
    one so far (`bound`) cuts branches.
    """
    bound, best = BLOWUP, None

    def extend(x: list[float], chosen: tuple[int, ...], worst: float) -> None:
        nonlocal bound, best
        start = chosen[-1] if chosen else 0
        segment = _conditions(x, triples[start:], lambda_min)
        for t, (condition, q) in enumerate(segment, start + 1):
            worst = max(worst, condition)
            if worst >= bound:
                return
            if len(chosen) < count and t < len(triples):
                extend(_times(q, x), (*chosen, t), worst)
        if len(chosen) == count:
            bound, best = worst, chosen

    extend(_grid(lambda_min), (), 1.0)
    return best


# ---- Polar Express -------------------------------------------------------------------------------
def polar_express(
    lower: float = 1e-3,
    steps: int = 5,
    cushion: float = 0.02407327424182761,
    safety: float = 1.0,
) -> Triples:
    """p_t = argmin max over [l_t, u_t] of |1 - p|, l <- p(l), u <- 2 - l, from [lower, 1].

    arXiv:2505.16932, algorithm 1 with its finite-precision rules. p_t is fitted on
    [max(l, cushion u), u] and rescaled so that p(l) + p(u) = 2. All but the last become
    p(x / safety). The defaults give the published table; NoahAmsel/PolarExpress @ 458c71b7 uses
    cushion=0.02 and safety=1.01.
    """
    _check_steps(steps)
    if not 1e-12 <= lower < 1:
        raise ValueError(f"coefficients: lower must be in [1e-12, 1), got {lower}")
    if not 0 <= cushion < 1:
        raise ValueError(f"coefficients: cushion must be in [0, 1), got {cushion}")
    if not 1 <= safety < 2:
        raise ValueError(f"coefficients: safety must be in [1, 2), got {safety}")
    low, high, out = lower, 1.0, []
    for t in range(steps):
        a, b, c = _minimax(max(low, cushion * high), high)
        if cushion * high > low:
            k = 2 / (_polynomial((a, b, c), low) + _polynomial((a, b, c), high))
            a, b, c = a * k, b * k, c * k
        if t < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        out.append((a, b, c))
        low = _polynomial((a, b, c), low)
        high = 2 - low
        low = min(low, high)
    return tuple(out)


def _minimax(low: float, high: float) -> Triple:
    """Return the odd quintic p with p - 1 = -E, E, -E, E at low, q, r, high; q, r its extremes."""
    limit = CUBING[0] / high, CUBING[1] / high**3, CUBING[2] / high**5
    if low / high >= 1 - 5e-6:
        return limit
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    error, previous = math.inf, 0.0
    for _ in range(100):
        x = (low, q, r, high)
        y = [v * v for v in x]
        # a + by + cy^2 = (1 - sE) / x at four points: their third divided difference is 0
        w = [1 / (v * math.prod(u - k for k in y if k != u)) for v, u in zip(x, y, strict=True)]
        previous, error = error, sum(w) / (w[0] - w[1] + w[2] - w[3])
        g = [(1 - s * error) / v for s, v in zip((1, -1, 1), x, strict=False)]
        b01, b12 = (g[1] - g[0]) / (y[1] - y[0]), (g[2] - g[1]) / (y[2] - y[1])
        c = (b12 - b01) / (y[2] - y[0])
        b = b01 - c * (y[0] + y[1])
        a = g[0] - y[0] * (b + c * y[0])
        d = 9 * b * b - 20 * a * c
        if not (d >= 0 and a > 0 > b and c > 0):  # too narrow: rounding decides these signs
            return limit
        root = math.sqrt(d)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        if abs(error - previous) <= 1e-15:
            break
    return a, b, c
