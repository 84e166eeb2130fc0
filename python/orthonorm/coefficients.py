"""X <- aX + (bA + cA^2)X with A = XX^T: the published (a, b, c) schedules and where they are safe.

On a singular value the iteration is x <- x(a + bx^2 + cx^4). The triples therefore determine all
else: the image, the slope at 0, the effect of rounding in the Gram form. It is computed in plain
Python, without torch. Only restarts, which take milliseconds to find, are stored; a test recomputes
them.

    c = resolve("polar_express")                  # 5 triples; also accepts triples themselves
    restarts = default_restarts(c, "float16")     # (2,): the meaning of restarts="auto"
    check_safe(c, dtype="float16", form="gram", restarts=restarts)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from types import MappingProxyType
from typing import get_args

# fmt: off
from ._polynomials import (  # isort: skip
    CUBING, KELLER, LAMBDA_MIN, ROUNDOFF, Form, PastEnd, Prescale, Triple, Triples, _check_steps,
    _choice, _image, _restarts, _search, _sequence, _triples, best_restarts, evaluate,
    gram_condition, image, polar_express, slope,
)

__all__ = [
    "ALIASES", "COEFFICIENTS", "LAMBDA_MIN", "LIMITS", "ROUNDOFF", "Coefficients", "Form",
    "PastEnd", "Prescale", "Triple", "Triples", "best_restarts", "check_safe", "default_restarts",
    "evaluate", "gram_condition", "image", "polar_express", "resolve", "slope",
]
# fmt: on


@dataclass(frozen=True)
class Coefficients:
    """x <- x(a + bx^2 + cx^4), one triple per iteration; immutable and hashable.

    triples apply to X / (safety * norm), norm = |X|_F, or AOL's row scaling if prescale == "aol".
    past_end: the triples of steps beyond the last, as in the source; fewer steps take a prefix.
    restarts: default_restarts for float16 at default_steps; None searches them when needed.
    measured: restarts with a condition above the limit that measurements found safe in float16.
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
        """Return the n triples to run (None: default_steps).

        Raise ValueError for more steps than triples if past_end is "error".
        """
        n = self.default_steps if n is None else n
        _check_steps(n)
        have = len(self.triples)
        if n > have and self.past_end == "error":
            raise ValueError(f"coefficients: {self.name} runs at most {have} steps, got {n}")
        if self.past_end == "cycle":
            return tuple(self.triples[i % have] for i in range(n))
        return tuple(self.triples[min(i, have - 1)] for i in range(n))

    def image(self, low: float = 1e-3, high: float = 1.0) -> tuple[float, float]:
        """Return (min, max) of the default steps over normalized singular values in [low, high]."""
        return image(self.steps(), low / self.safety, high / self.safety)

    @property
    def slope(self) -> float:
        """f'(0) / safety: the factor of the smallest singular values in the default steps."""
        return slope(self.steps()) / self.safety

    def safe_dtypes(self, form: Form) -> tuple[str, ...]:
        """Return the dtypes that check_safe accepts with default_restarts."""
        return tuple(d for d in ROUNDOFF if not _unsafe(self, d, form, default_restarts(self, d)))


# ---- data, each with its source ------------------------------------------------------------------
_RAW: Triples = (  # polar_express() with its default arguments
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    CUBING,
)
_MNG: Triples = (  # polar_express(cushion=0.02, safety=1.02)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def _deflated(s: float) -> Triples:
    """Return the raw table with p(x / s) for all triples but the last, as the paper lists them."""
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in _RAW[:-1]) + _RAW[-1:]


_ARXIV = "https://arxiv.org/abs/"
_EO = "https://github.com/NVIDIA-NeMo/Emerging-Optimizers"
_PE = _ARXIV + "2505.16932"
_KOZISTR = "https://github.com/kozistr/pytorch_optimizer utils/matrix.py"
_OVERSHOOT = "no safety factor: f(1.01) is about 1e95, so half precision is refused"

# fmt: off
_SETS = (
    Coefficients(
        "keller", (KELLER,), "https://kellerjordan.github.io/posts/muon/", restarts=(3,),
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
    # gram-newton-schulz, dmuon and optax stop after 5 triples, all deflated; ours continue likewise
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
        (1.8564, -1.2132, 0.3568), CUBING,
    ), f"{_EO} (1.01 divided in, rounded)", restarts=(1, 2)),
    # Here the fit itself accounts for safety: polar_express(steps=8, cushion=0.02, safety=s).
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
        "deepseek_v4", (KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
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
    Coefficients("classic_quintic", (CUBING,), _ARXIV + "2409.20325", restarts=()),
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
        (1.874999066623701, -1.2499981332141676, 0.37499906659046633), CUBING,
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
# seven spectra (Gaussian, two logarithmic, rank 1, rank n/2, constant, two spikes).
# float16: all restarts with a condition up to 400 kept the output norm within 5 % of exact (8 % at
#   n = 64..512, m/n = 2..32). Of nine at 444-667 five failed (norm x1.5-7.8); 7.6e4 overflowed.
# float32: up to 1e7 errors are <= 2e-3 (6e-5 for keller without restart). Beyond, they are
#   2e-4..9e-3 (you5, Polar Express) and 1e26 (deepseek_v4).
# float64: judged with lambda_min scaled to its roundoff (largest condition: 8e4, deepseek_v4).
# bfloat16: refused. Even with the best restarts norms are x1.1-20 (errors 0.2-0.9).
LIMITS: Mapping[str, float] = MappingProxyType({"float16": 400.0, "float32": 1e7, "float64": 1e7})


def default_restarts(coefficients: Coefficients, dtype: str) -> tuple[int, ...]:
    """Return the fewest restarts with gram_condition <= 400, at their best positions.

    These are the restarts="auto" of `polar`. float64 takes none, and neither does float32 if the
    condition without restarts is <= 1e7 (keller: error 6e-5). bfloat16, which check_safe refuses,
    gets those of float16.
    """
    _choice("dtype", dtype, tuple(ROUNDOFF))
    triples = coefficients.steps()
    if dtype == "float64" or (dtype == "float32" and gram_condition(triples) <= LIMITS[dtype]):
        return ()
    if coefficients.restarts is not None:
        return coefficients.restarts
    tried: list[tuple[float, tuple[int, ...]]] = []
    for count in range(min(4, len(triples))):
        if (restarts := _search(triples, count, LAMBDA_MIN)) is not None:
            tried.append((gram_condition(triples, restarts), restarts))
            if tried[-1][0] <= LIMITS["float16"]:
                return restarts
    for every in (4, 3, 2, 1):  # long schedules, which need more than three restarts
        restarts = tuple(range(every, len(triples), every))
        tried.append((gram_condition(triples, restarts), restarts))
        if tried[-1][0] <= LIMITS["float16"]:
            return restarts
    return min(tried)[1]


def check_safe(
    coefficients: Coefficients,
    *,
    dtype: str,
    form: Form,
    restarts: Sequence[int] = (),
    allow_unsafe: bool = False,
) -> None:
    """Raise ValueError for a combination known to blow up or flip signs; it names a safe one.

    Judges the default steps (after resolve: the steps asked for). `dtype` stores X in the direct
    form, and R, Q and Z in the Gram form. The direct form ignores `restarts`. allow_unsafe=True
    checks the arguments only.
    """
    _choice("dtype", dtype, tuple(ROUNDOFF))
    _choice("form", form, get_args(Form))
    reason = _unsafe(coefficients, dtype, form, _restarts(restarts, len(coefficients.steps())))
    if reason and not allow_unsafe:
        raise ValueError(f"coefficients: {reason}")


def _escapes(c: Coefficients, dtype: str) -> str:
    """Return "diverge" or "change sign" if sigma_1 can do so through rounding, else "".

    Each stored result may be off by 2 units of roundoff. That leaves the interval of sets without a
    safety factor. It stays within that of sets with 1.01, which run in bfloat16 in HeavyBall and
    Emerging-Optimizers.
    """
    exact = _image(c.steps(), 0.0, 1 / c.safety, 0.0)
    low, high = _image(c.steps(), 0.0, 1 / c.safety, 2 * ROUNDOFF[dtype])
    return "diverge" if high > 2 * exact[1] else "change sign" if low < 0 else ""


def _unsafe(c: Coefficients, dtype: str, form: Form, restarts: tuple[int, ...]) -> str:
    """Return why a combination is unsafe, as a sentence that names a safe one; "" if it is safe."""
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
    """Return the schedule of a name, of one (a, b, c) repeated `steps` (5) times, or of a list.

    The triples of the result are exactly the steps asked for (1 to 99).

    Raises: ValueError for an unknown name, a wrong length, a non-finite number, or more steps than
    the source defines; TypeError for any other type.
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
