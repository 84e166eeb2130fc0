"""X <- aX + (bA + cA^2)X with A = XX^T: the published (a, b, c) schedules and where they are safe.

On a singular value the iteration is x <- x(a + bx^2 + cx^4), so all a schedule does (its image, its
slope at 0, what rounding does to it in the Gram form) follows from the triples, in plain Python:
nothing here needs torch. Stored is what costs milliseconds (restarts); a test recomputes it.

    c = resolve("polar_express")                  # 5 triples; a triple or a list of them also does
    restarts = default_restarts(c, "float16")     # (2,): what restarts="auto" means
    check_safe(c, dtype="float16", form="gram", restarts=restarts)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from types import MappingProxyType
from typing import Literal, get_args

Triple = tuple[float, float, float]
Triples = tuple[Triple, ...]
PastEnd = Literal["repeat_last", "cycle", "error"]
Prescale = Literal["frobenius", "aol"]
Form = Literal["direct", "gram"]

# Unit roundoff of the type that stores X (direct form) or R, Q and Z (Gram form).
ROUNDOFF: Mapping[str, float] = MappingProxyType(
    {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
)
# How far below zero float16 rounding pushes an eigenvalue of XX^T (gram-newton-schulz's default).
LAMBDA_MIN = -4e-4
BLOWUP = 1e8  # the condition from which that package's search refuses a placement


# ---- arguments -----------------------------------------------------------------------------------
def _sequence(value: object) -> tuple[object, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(
            "coefficients: must be a name, an (a, b, c) triple, a list of triples or Coefficients, "
            f"got {type(value).__name__}"
        )
    return tuple(value)


def _triples(value: object) -> Triples:
    """Finite triples of floats, 1 to 99 of them."""
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
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"coefficients: steps must be an int, got {steps!r}")
    if not 1 <= steps < 100:
        raise ValueError(f"coefficients: steps must be in [1, 99], got {steps}")


def _restarts(restarts: Sequence[int], steps: int) -> tuple[int, ...]:
    """Positions in strictly increasing order; restart r happens before iteration r (from 0)."""
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


# ---- what a schedule does to one singular value --------------------------------------------------
def evaluate(triples: Sequence[Triple], x: float) -> float:
    """f(x), the composed odd polynomial; +-inf where it overflows."""
    for t in _triples(triples):
        x = _polynomial(t, x)
    return x


def slope(triples: Sequence[Triple]) -> float:
    """f'(0) = product of a."""
    return math.prod(t[0] for t in _triples(triples))


def image(triples: Sequence[Triple], low: float = 1e-3, high: float = 1.0) -> tuple[float, float]:
    """(min f, max f) over [low, high], exact up to rounding; infinite where f overflows.

    A continuous map takes an interval to the interval between its extremes, so each step is mapped
    exactly from its ends and its critical points: no grid that could miss a narrow peak.
    """
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"coefficients: image needs finite low <= high, got [{low}, {high}]")
    return _image(_triples(triples), low, high, 0.0)


def _image(triples: Triples, low: float, high: float, rounding: float) -> tuple[float, float]:
    """The image when every value, the input included, may be off by a factor 1 +- rounding."""

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
    if abs(x) > 1e60:  # the leading term alone: no inf - inf, no 0 * inf
        return c * x * x * x * x * x if c else b * x * x * x if b else a * x if a else 0.0
    y = x * x
    return x * (a + y * (b + y * c))


# ---- what rounding does in the Gram form ---------------------------------------------------------
def gram_condition(
    triples: Sequence[Triple], restarts: Sequence[int] = (), lambda_min: float = LAMBDA_MIN
) -> float:
    """max over iterations t of max_x |q_t| / min_x |q_t|, where r_0 = x^2 + lambda_min, q = 1.

    The criterion of gram-newton-schulz's restart search (restart_autotune.py, stability_metric):
    rounding makes R = XX^T indefinite, so each eigenvalue is shifted by lambda_min < 0 and follows
    z = a + br + cr^2, q <- qz, r <- rz^2; a restart sets x <- qx, r <- x^2 + lambda_min, q <- 1.
    x runs over a logarithmic grid (theirs: 10,000 points in [1e-10, 1]; here 400 a decade, down to
    where x^2 is far below |lambda_min|). Q multiplies rounding errors by up to this condition.
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
    """(condition of Q, Q) after each iteration from Q = I; stops at the first infinite one."""
    r, q = [v * v + lambda_min for v in x], [1.0] * len(x)
    for a, b, c in triples:
        z = [a + v * (b + v * c) for v in r]
        q, r = _times(q, z), _times(_times(r, z), z)
        top, bottom = max(map(abs, q)), min(map(abs, q))
        if not (bottom > 0 and top < 1e150):  # beyond, r = (qx)^2 overflows
            yield math.inf, q
            return
        yield top / bottom, q


def best_restarts(
    triples: Sequence[Triple], count: int = 1, *, lambda_min: float = LAMBDA_MIN
) -> tuple[int, ...]:
    """argmin over `count` positions 1 <= r < steps of gram_condition (the first of equal ones).

    Before iteration r, counted from 0: X <- QX, R <- XX^T, Q <- I. ValueError where every placement
    reaches 1e8, as in the original search: more restarts are needed.
    """
    triples = _triples(triples)
    _check_lambda(lambda_min)
    if not 0 <= count < len(triples):
        raise ValueError(f"coefficients: count must be in [0, {len(triples)}), got {count}")
    found = _search(triples, count, float(lambda_min))
    if found is None:
        raise ValueError(
            f"coefficients: these {len(triples)} steps need more restarts, got count={count}"
        )
    return found


@lru_cache(maxsize=512)
def _search(triples: Triples, count: int, lambda_min: float) -> tuple[int, ...] | None:
    """Depth first in lexicographic order; the maximum only grows, so `bound` cuts branches."""
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

    arXiv:2505.16932, algorithm 1 with its finite-precision rules: p_t is fitted on [max(l, cushion
    * u), u] and rescaled so that p(l) + p(u) = 2; all but the last use p(x / safety). The defaults
    give the published table. NoahAmsel/PolarExpress @ 458c71b7 now uses cushion=0.02, safety=1.01.
    """
    _check_steps(steps)
    if not 0 < lower < 1:
        raise ValueError(f"coefficients: lower must be in (0, 1), got {lower}")
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
    """The odd quintic with p - 1 = -E, E, -E, E at low, q, r, high, q and r being its extremes."""
    if low / high >= 1 - 5e-6:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
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
        d = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - d) / (10 * c)), math.sqrt((-3 * b + d) / (10 * c))
        if abs(error - previous) <= 1e-15:
            break
    return a, b, c


@dataclass(frozen=True)
class Coefficients:
    """x <- x(a + bx^2 + cx^4), one triple per iteration; immutable and hashable.

    Input: X / (safety * norm), norm = |X|_F, or AOL's row scaling where prescale == "aol".
    past_end: what more steps than triples mean (as the source has it); fewer steps are a prefix.
    restarts: default_restarts for float16 at default_steps (None: searched when asked for).
    measured: Gram placements above the limit that were measured to hold in float16.
    """

    name: str
    triples: Triples
    source: str
    default_steps: int = 5
    past_end: PastEnd = "repeat_last"
    safety: float = 1.0
    prescale: Prescale = "frobenius"
    restarts: tuple[int, ...] | None = None
    measured: tuple[tuple[int, ...], ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "triples", _triples(self.triples))
        _choice("past_end", self.past_end, get_args(PastEnd))
        _choice("prescale", self.prescale, get_args(Prescale))
        if not (math.isfinite(self.safety) and self.safety > 0):
            raise ValueError(f"coefficients: safety must be positive, got {self.safety}")
        _check_steps(self.default_steps)
        for positions in (self.restarts or (), *self.measured):
            _restarts(positions, self.default_steps)

    def steps(self, n: int | None = None) -> Triples:
        """The n triples to run (None: default_steps); ValueError past the end if "error"."""
        n = self.default_steps if n is None else n
        _check_steps(n)
        have = len(self.triples)
        if n > have and self.past_end == "error":
            raise ValueError(f"coefficients: {self.name} runs at most {have} steps, got {n}")
        if self.past_end == "cycle":
            return tuple(self.triples[i % have] for i in range(n))
        return tuple(self.triples[min(i, have - 1)] for i in range(n))

    def image(self, low: float = 1e-3, high: float = 1.0) -> tuple[float, float]:
        """(min, max) of the default steps over normalized singular values in [low, high]."""
        return image(self.steps(), low / self.safety, high / self.safety)

    @property
    def slope(self) -> float:
        """f'(0) / safety: what the default steps multiply the smallest singular values by."""
        return slope(self.steps()) / self.safety

    def safe_dtypes(self, form: Form) -> tuple[str, ...]:
        """The dtypes that check_safe accepts with default_restarts."""
        return tuple(d for d in ROUNDOFF if not _unsafe(self, d, form, default_restarts(self, d)))


# ---- data: KERNELS.md 4.1, ALGORITHMS.md B2.5 ----------------------------------------------------
_KELLER: Triple = (3.4445, -4.7750, 2.0315)
_RAW: Triples = (  # polar_express() with its default arguments
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_MNG: Triples = (  # polar_express(cushion=0.02, safety=1.02)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def _deflated(s: float) -> Triples:
    """p(x / s) for all of the raw table but its last triple, as the paper's listing has it."""
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in _RAW[:-1]) + _RAW[-1:]


_ARXIV = "https://arxiv.org/abs/"
_EO = "https://github.com/NVIDIA-NeMo/Emerging-Optimizers"
_PE = _ARXIV + "2505.16932"
_KOZISTR = "https://github.com/kozistr/pytorch_optimizer utils/matrix.py"
_OVERSHOOT = "no safety factor: f(1.01) is about 1e95, so half precision is refused"

# fmt: off
_SETS = (
    Coefficients(
        "keller", (_KELLER,), "https://kellerjordan.github.io/posts/muon/", restarts=(3,),
        note="without restart in float16 a rank-1 X comes out x1.06 (n = 256) to x1.8 (48 x 192)",
    ),
    Coefficients("you5", (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ), "https://x.com/YouJiacheng/status/1905861218138804534", restarts=(2,)),
    Coefficients("you6", tuple((a / 1024, b / 1024, c / 1024) for a, b, c in (
        (3955, -8306, 5008), (3735, -6681, 3463), (3799, -6499, 3211), (4019, -6385, 2906),
        (2677, -3029, 1162), (2172, -1833, 682),
    )), "https://x.com/YouJiacheng/status/1893704552689303901", 6, "error", restarts=(2,)),
    Coefficients("leloykun5", (
        (4.01, -9.22, 5.80), (3.49, -6.38, 3.23), (3.34, -6.21, 3.20), (3.64, -7.48, 4.43),
        (3.46, -5.35, 2.85),
    ), "https://leloykun.github.io/ponder/muon-opt-coeffs/", past_end="error", restarts=(2,)),
    # gram-newton-schulz, dmuon and optax stop after 5 triples, all deflated; steps 6-8 go on alike.
    Coefficients(
        "polar_express", _deflated(1.05), f"{_PE}, 1.05 of Dao-AILab/gram-newton-schulz",
        restarts=(2,), measured=((3,),),
    ),
    Coefficients(
        "polar_express_1.01", _deflated(1.01), f"{_PE} (its listing also divides X by 1.01)",
        restarts=(1, 2), note="one restart is not enough in float16: (1,) gives 1.6x the norm",
    ),
    Coefficients(
        "polar_express_1.02", _MNG, "https://github.com/KellerJordan/modded-nanogpt train_gpt.py, "
        "microsoft/dion polar_express.py", past_end="error", safety=1.02, restarts=(2,),
    ),
    Coefficients(
        "polar_express_raw", _RAW, _PE, restarts=(1, 4), note=_OVERSHOOT,
    ),
    Coefficients("polar_express_nvidia", (
        (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568), (1.875, -1.25, 0.375),
    ), f"{_EO} (1.01 divided in, rounded)", restarts=(1, 2)),
    # The factor is part of each interval: polar_express(steps=8, cushion=0.02, safety=s).
    Coefficients("polar_express_rederived_1.01", (
        (8.237312490495555, -23.157747414558198, 16.680568411445915),
        (4.082441999064835, -2.893047735332586, 0.5252849256975648),
        (3.9263479922546582, -2.8547468034765298, 0.5318022422894988),
        (3.2982187133085143, -2.424541981026706, 0.48632008358844075),
        (2.2970369434552573, -1.63662558125903, 0.4002628455953627),
        (1.8763805351440397, -1.2347896577722228, 0.35891887501668385),
        (1.8564423485617974, -1.2132449880935525, 0.3568003487825883),
        (1.8749994008682747, -1.2499988017229169, 0.3749994008546422),
    ), _KOZISTR, 8, restarts=(1, 3)),
    Coefficients("polar_express_rederived_1.02", (
        *_MNG[:4],  # published with the same digits to 1e-14
        (2.3005307116270983, -1.6111665557258408, 0.3833374427545273),
        (1.8631210546382593, -1.2042160621002727, 0.3421879560523383),
        (1.8382572152247512, -1.1779263289537742, 0.3396513038637379),
        (1.8749999923301852, -1.2499999836060613, 0.374999991275876),
    ), _KOZISTR, 8, restarts=(2, 4)),
    Coefficients("polar_express_old", (
        (7.2086, -15.5131, 9.0178), (3.9623, -2.5813, 0.4542), (3.9466, -2.5765, 0.4544),
        (3.8991, -2.5671, 0.4566), (3.7186, -2.5308, 0.4653), (3.1390, -2.3073, 0.4733),
        (2.1715, -1.5246, 0.3885), (1.8648, -1.2224, 0.3577),
    ), "https://github.com/NVIDIA/Megatron-LM muon_utils.py (early)", 8, "cycle",
        restarts=(1, 3, 5)),
    Coefficients("cans", (
        (8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162),
    ), f"{_ARXIV}2506.10935, {_EO}", restarts=(1, 4), note=_OVERSHOOT),
    Coefficients("aol", (
        (4.6051, -9.6552, 5.6769), (4.7505, -6.0861, 2.1790), (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    ), f"https://github.com/thib-s/flash-newton-schulz @ cdb03db0e6c5, {_ARXIV}2512.04632", 4,
        "error", prescale="aol", restarts=(2,),
        note="AOL scales rows, so the result is not the polar factor of X but of diag(s)X"),
    Coefficients("aol_flipping", (
        (4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ), f'{_EO} "aol"', 4, "cycle", prescale="aol",
        note="BROKEN: reverses every singular direction above 0.884 (f(1) = -0.99)"),
    Coefficients(
        "deepseek_v4", (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        "https://huggingface.co/deepseek-ai/DeepSeek-V4-Pro/resolve/main/DeepSeek_V4.pdf", 10,
        "error", restarts=(2, 4, 6),
    ),
    Coefficients("cubic5", (
        (3.3656576, -3.3420992, 0.0), (2.5744352, -1.4957376, 0.0), (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0), (2.2230472, -0.9630650, 0.0),
    ), f"{_ARXIV}2606.00371 (l0 = 7e-3)", past_end="error", safety=1.01, restarts=(),
        note="safety is ours (published: 1): p_1 < 0 above sigma = 1.0035, which the rounding of a "
        "rank-1 X to bfloat16 reaches (cosine -0.33 measured for a constant 8 x 127 matrix)"),
    Coefficients("classic_cubic", ((1.5, -0.5, 0.0),), _ARXIV + "2409.20325", restarts=()),
    Coefficients("classic_quintic", ((1.875, -1.25, 0.375),), _ARXIV + "2409.20325", restarts=()),
    Coefficients(
        "convergent_quintic", ((2.0, -1.5, 0.5),), "https://kellerjordan.github.io/posts/muon/",
        restarts=(), note="the convergent baseline of that post and the tail of deepseek_v4",
    ),
    Coefficients(
        "modula_quintic", ((3.0, -3.2, 1.2),), "https://github.com/modula-systems/modula",
        restarts=(3,),
    ),
    Coefficients("inverse_root", (
        (7.424865680309214, -18.39581635618996, 12.896720413604342),
        (3.4877256051546017, -2.3300436563986993, 0.4404692168431095),
        (2.7766085124882527, -2.070643152532662, 0.46302261050004967),
        (1.9913142104341506, -1.373936700681269, 0.3875934979568538),
        (1.8754637749479246, -1.2505152090010534, 0.37505152463617264),
        (1.874999066623701, -1.2499981332141676, 0.37499906659046633), (1.875, -1.25, 0.375),
    ), "LoRA-Muon, appendix B.4, table 2", 7, restarts=(2,),
        note="made for P^(-1/2): W = a + bP + cP^2, P <- PW^2; its source divides P by 1.001"),
)
COEFFICIENTS: Mapping[str, Coefficients] = MappingProxyType({c.name: c for c in _SETS})
ALIASES: Mapping[str, str] = MappingProxyType({
    "simple": "keller", "quintic": "you5", "cubic": "classic_cubic", "deepseekv4": "deepseek_v4",
    "polar_express_1.05": "polar_express", "polar_express_dion": "polar_express_1.02",
})
# fmt: on


# ---- safety --------------------------------------------------------------------------------------
# Largest gram_condition accepted. Measured in emulation with fp32 accumulation: n = 256, m = 1024,
# seven spectra (Gaussian, two logarithmic, rank 1, rank n/2, constant, two spikes). float16: every
# placement up to 400 kept the output norm within 5 % of exact (8 % at n = 64..512, m/n = 2..32); of
# the nine at 444-667, five lost it (x1.5-7.8); 7.6e4 overflowed. float32: up to 1e7 errors are
# <= 2e-3 (6e-5 for keller without restart); beyond, 2e-4..9e-3 (you5, Polar Express) and 1e26
# (deepseek_v4). float64 is judged with lambda_min scaled to its roundoff (worst: 8e4, deepseek_v4).
# bfloat16: norms of x1.1-20 with the best restart (KERNELS.md 4.4: errors 0.2-0.9), so no limit.
LIMITS: Mapping[str, float] = MappingProxyType({"float16": 400.0, "float32": 1e7, "float64": 1e7})


def default_restarts(coefficients: Coefficients, dtype: str) -> tuple[int, ...]:
    """The fewest restarts with gram_condition <= 400, at their best positions: restarts="auto".

    () in float64, and in float32 where the condition without restarts is <= 1e7 (keller: error
    6e-5). bfloat16, which check_safe refuses, gets those of float16.
    """
    _choice("dtype", dtype, tuple(ROUNDOFF))
    triples = coefficients.steps()
    if dtype == "float64" or (dtype == "float32" and gram_condition(triples) <= LIMITS[dtype]):
        return ()
    if coefficients.restarts is not None:
        return coefficients.restarts
    found: list[tuple[float, tuple[int, ...]]] = []
    for count in range(min(4, len(triples))):
        if (restarts := _search(triples, count, LAMBDA_MIN)) is not None:
            found.append((gram_condition(triples, restarts), restarts))
            if found[-1][0] <= LIMITS["float16"]:
                return restarts
    for every in (4, 3, 2, 1):  # schedules so long that they need more than three
        restarts = tuple(range(every, len(triples), every))
        found.append((gram_condition(triples, restarts), restarts))
        if found[-1][0] <= LIMITS["float16"]:
            return restarts
    return min(found)[1]


def check_safe(
    coefficients: Coefficients,
    *,
    dtype: str,
    form: Form,
    restarts: Sequence[int] = (),
    allow_unsafe: bool = False,
) -> None:
    """Raise ValueError, naming a safe alternative, for what is known to blow up or to flip signs.

    Judged are the default steps (those asked for, after resolve) with X stored in `dtype`, or R, Q
    and Z in the Gram form. The direct form ignores `restarts`; allow_unsafe checks only arguments.
    """
    _choice("dtype", dtype, tuple(ROUNDOFF))
    _choice("form", form, get_args(Form))
    reason = _unsafe(coefficients, dtype, form, _restarts(restarts, len(coefficients.steps())))
    if reason and not allow_unsafe:
        raise ValueError(f"coefficients: {reason}; allow_unsafe=True overrides")


def _escapes(c: Coefficients, dtype: str) -> str:
    """What happens to sigma_1 when each stored result is off by 2 units of roundoff, or "".

    2 units leave the interval of sets without a safety factor, and not that of sets with 1.01,
    which run in bfloat16 in HeavyBall and Emerging-Optimizers.
    """
    exact = _image(c.steps(), 0.0, 1 / c.safety, 0.0)
    low, high = _image(c.steps(), 0.0, 1 / c.safety, 2 * ROUNDOFF[dtype])
    return "diverge" if high > 2 * exact[1] else "change sign" if low < 0 else ""


def _unsafe(c: Coefficients, dtype: str, form: Form, restarts: tuple[int, ...]) -> str:
    """One sentence with a safe alternative, or ""."""
    if _image(c.steps(), 0.0, 1 / c.safety, 0.0)[0] < 0:
        return f"use 'polar_express' or 'aol', got {c.name}, which reverses singular directions"
    if what := _escapes(c, dtype):
        held = [d for d in ROUNDOFF if not _escapes(c, d)]
        return (
            f"use 'polar_express' or store {' or '.join(held) or 'nothing'}, got {dtype}, whose "
            f"rounding makes {c.name} {what}"
        )
    if form == "direct" or (dtype == "float16" and restarts in c.measured):
        return ""
    if dtype == "bfloat16":
        return (
            f"store float16 in the Gram form (restarts={default_restarts(c, 'float16')}) or use "
            f"form='direct', got bfloat16, whose rounding the Gram form of {c.name} multiplies"
        )
    triples, limit = c.steps(), LIMITS[dtype]
    scale = ROUNDOFF[dtype] / ROUNDOFF["float16"] if dtype == "float64" else 1.0
    if (condition := gram_condition(triples, restarts, LAMBDA_MIN * scale)) <= limit:
        return ""
    better = default_restarts(c, dtype)
    fits = gram_condition(triples, better, LAMBDA_MIN * scale) <= limit
    return (
        f"use {f'restarts={better} or ' if fits else ''}form='direct', got restarts={restarts}, "
        f"with which {c.name} has gram_condition {condition:.1e} > {limit:g} ({dtype})"
    )


def resolve(
    coefficients: str | Coefficients | Sequence[float] | Sequence[Sequence[float]],
    steps: int | None = None,
) -> Coefficients:
    """The schedule to run: a name, one (a, b, c) repeated `steps` (5) times, or a list of them.

    The result's triples are exactly the steps asked for (1 to 99). ValueError: unknown name, wrong
    length, non-finite number, more steps than the source defines; TypeError: any other type.
    """
    if isinstance(coefficients, str):
        name = ALIASES.get(coefficients, coefficients)
        if name not in COEFFICIENTS:
            known = ", ".join(sorted([*COEFFICIENTS, *ALIASES]))
            raise ValueError(f"coefficients: name must be one of {known}, got {coefficients!r}")
        chosen = COEFFICIENTS[name]
    elif isinstance(coefficients, Coefficients):
        chosen = coefficients
    elif all(isinstance(v, Real) for v in _sequence(coefficients)):
        chosen = Coefficients("custom", _triples([coefficients]), "the caller")
    else:
        triples = _triples(coefficients)
        chosen = Coefficients("custom", triples, "the caller", len(triples), "error")
        if steps is not None and steps != len(triples):
            _check_steps(steps)
            raise ValueError(
                f"coefficients: steps must be None or the {len(triples)} triples given, got {steps}"
            )
    run = chosen.steps(steps)
    same = len(run) == chosen.default_steps
    return replace(
        chosen,
        triples=run,
        default_steps=len(run),
        past_end="error",
        restarts=chosen.restarts if same else None,
        measured=chosen.measured if same else (),
    )
