"""The suite `claims`: every figure that the project promises, its target, and if it held now.

A ratio is the median over rounds of the ratio of two times in a round, so other work that slows a
whole round cancels. Measure a claim that does not hold on a busy machine again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orthonorm import nn as onn
from orthonorm.optim import REGISTRY
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from . import candidates, packages, peers, report
from .cases import CASES, LARGE, STEPS
from .environment import import_times, peak_extra_memory
from .inputs import Inputs
from .measure import Request, measure
from .records import Record
from .shapes import MODELS, parse
from .steps import KERNELS, MUON, Model
from .timing import Plan, interleave, median_ratio, quantile

# targets in float32 and in bfloat16
SMALL_TARGETS = {"500x32x32": (100.0, 200.0), "500x64x64": (19.0, 30.0), "64x128x128": (4.5, 6.0)}
FOUR_TO_ONE = ("768x3072", "1024x4096")
K2 = (
    "rotated_adam_", "row_moment_", "column_moment_", "factored_moment_", "elementwise_moment_",
    "row_normalize", "column_normalize",
)  # fmt: skip
FLOOR = peers.FLOOR.label
POLYNOMIAL, POWER, EAGER = (
    peers.TORCH[name][0].label for name in ("newton_schulz", "power_iteration_", "conda_step_")
)


@dataclass(frozen=True)
class Claim:
    """One promise as measured: figure `>=` or `<=` target.

    `exact` also demands an error no larger than that of the other; `against` names the other.
    """

    what: str
    figure: float
    relation: str
    target: float
    unit: str = "x"
    ours: str = ""
    other: str = ""
    error: float | None = None
    other_error: float | None = None
    exact: bool = False
    against: str = ""

    @property
    def held(self) -> bool:
        within = self.figure >= self.target if self.relation == ">=" else self.figure <= self.target
        if not self.exact or self.error is None or self.other_error is None:
            return within
        return within and self.error <= self.other_error

    def cells(self) -> tuple[str, ...]:
        errors = ["" if e is None else f"{e:.1e}" for e in (self.error, self.other_error)]
        target = f"{self.relation} {self.target:g}{self.unit}"
        held = "held" if self.held else "NOT HELD"
        return (self.what, self.ours, self.other, f"{self.figure:.3g}{self.unit}", target, held,
                *errors)  # fmt: skip


HEAD = ("", "ours", "other", "figure", "target", "", "our error", "its error")


def compare(rows: list[Record], other: str, what: str, relation: str, target: float) -> Claim:
    """Make a claim from records: the other's time over ours (">="), or ours over its ("<=")."""
    ours, peer = rows[0], next(row for row in rows if row.backend == other)
    if ours.median_ms is None or peer.median_ms is None or peer.round_ratio is None:
        return Claim(f"{what}: {ours.note or peer.note}", math.nan, relation, target, against=other)
    figure = peer.round_ratio if relation == ">=" else 1 / peer.round_ratio
    mine, its = (f"{report.milliseconds(ms)} ms" for ms in (ours.median_ms, peer.median_ms))
    return Claim(what, figure, relation, target, "x", mine, its, ours.error, peer.error,
                 against=other)  # fmt: skip


Found = tuple[Claim, list[Record]]
Section = tuple[str, Callable[[Request], Iterator[Found]]]


def _polynomials(base: Request) -> Iterator[Found]:
    for shape, targets in SMALL_TARGETS.items():
        for precision, least in zip(("float32", "bfloat16"), targets, strict=True):
            rows = measure(replace(base, name="newton_schulz", workload=parse(shape),
                                   precision=precision, kinds=("torch",)))  # fmt: skip
            claim = compare(rows, POLYNOMIAL, f"newton_schulz {shape} {precision}", ">=", least)
            yield replace(claim, exact=True), rows
    for shape in LARGE:
        wide = shape in FOUR_TO_ONE
        for precision, target in ((None, 1.6 if wide else 1.0), ("bfloat16", 2.2 if wide else 1.6)):
            rows = measure(replace(base, name="newton_schulz", workload=parse(shape),
                                   precision=precision, kinds=("torch",)))  # fmt: skip
            claim = compare(
                rows, POLYNOMIAL, f"newton_schulz {shape} {precision or 'auto'}", ">=", target
            )
            yield replace(claim, exact=True), rows


PACKAGES = (  # factors to reach over the best package in that dtype
    ("float32", {"2048x2048": 3.5, "768x3072": 7.0}),
    ("bfloat16", {"500x32x32": 3.0, "500x64x64": 1.8, "64x128x128": 1.5}),
)


def _packages(base: Request) -> Iterator[Found]:
    """Compare with the fastest package that is installed and runs in the same dtype."""
    for precision, targets in PACKAGES:
        for shape, target in targets.items():
            rows = measure(replace(base, name="newton_schulz", workload=parse(shape),
                                   precision=precision, kinds=tuple(packages.SOURCES)))  # fmt: skip
            others = [r for r in rows[1:] if r.median_ms is not None]
            if others:
                best = min(others, key=lambda r: r.median_ms or math.inf)
                what = f"newton_schulz {shape} {precision}, packages"
                yield compare(rows, best.backend, what, ">=", target), rows


ODD = (("771x1283", "768x1280"), ("200x50x50", "200x64x64"), ("33x4097", "64x4096"))


def _odd_sizes(base: Request) -> Iterator[Found]:
    """Compare odd sizes with the multiples of 32 to which their work is rounded."""
    for odd, even in ODD:
        calls = {}
        for shape in (odd, even):
            case = CASES["newton_schulz"]
            (a,) = case.calls(parse(shape), Inputs(device=base.device))
            calls[shape] = functools.partial(case.op, **a)
        samples = interleave(calls, base.plan, base.device)
        medians = (1e3 * quantile(samples[s], 0.5) for s in (odd, even))
        mine, other = (f"{report.milliseconds(ms)} ms" for ms in medians)
        figure = median_ratio(samples[odd], samples[even])
        yield Claim(f"{odd} against {even}", figure, "<=", 1.15, "x", mine, other), []


def _conda(base: Request) -> Iterator[Found]:
    workload = MODELS["gpt2-small-3"]
    rows = measure(replace(base, name="conda_step_", workload=workload, kinds=("torch",)))
    yield compare(rows, EAGER, "conda_step_, 21 M parameters", ">=", 1.5), rows
    case = CASES["conda_step_"]
    calls = case.calls(workload, Inputs(device=base.device))
    extra = [
        peak_extra_memory(peer.start(case, calls).call, base.device)
        for peer in (candidates.Peer("", "ours", candidates.start_ours), *peers.TORCH[case.name])
    ]
    largest = max(w.numel() * w.element_size() for w in calls[0]["params"])
    mine, other = (f"{e / 2**20:.1f} MiB" for e in extra)
    yield Claim("conda_step_, extra memory", extra[0] / largest, "<=", 1.0, "x", mine, other,
                against="one work buffer"), []  # fmt: skip


def _moments(base: Request) -> Iterator[Found]:
    for name in K2:
        workload = MODELS["gpt2-small"]
        rows = measure(replace(base, name=name, workload=workload, kinds=("floor",)))
        yield compare(rows, FLOOR, name, "<=", 1.1), rows


def _power(base: Request) -> Iterator[Found]:
    workload = MODELS["gpt2-small"]
    kinds = ("torch", "floor")  # the reference takes 40 times as long and would leave few rounds
    rows = measure(replace(base, name="power_iteration_", workload=workload, kinds=kinds))
    yield compare(rows, FLOOR, "power_iteration_, one step", "<=", 1.15), rows
    yield compare(rows, POWER, "power_iteration_, one step", ">=", 4.5), []


LAYERS, WIDTHS = 100, (32, 64, 128, 256, 512)


class _Weights(nn.Sequential):
    """Layers whose forward returns their weights: it costs the normalization and nothing else."""

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self]


def _layers(base: Request) -> Iterator[Found]:
    """Compare forwards that normalize all weights of a network and keep their graphs."""
    for width in WIDTHS:
        W = Inputs(device=base.device).matrix("W", (LAYERS, width, width))
        models = {}
        for name in ("ours", "torch"):
            models[name] = _Weights(*(nn.Linear(width, width, bias=False) for _ in W))
            for layer, w in zip(models[name], W, strict=True):
                layer.weight = nn.Parameter(w.clone())
        onn.spectral_norm_(models["ours"])
        for layer, other in zip(models["torch"], models["ours"], strict=True):
            spectral_norm(layer)
            mine, its = (m.parametrizations.weight[0] for m in (other, layer))
            its._u, its._v = mine._u.clone(), mine._v.clone()
        norms, its = ([x.detach().double().norm() for x in models[name]()] for name in models)
        apart = max(abs(a / b - 1).item() for a, b in zip(norms, its, strict=True))
        results: dict[str, list[Tensor]] = {}

        def forward(name: str, models: Any = models, results: Any = results) -> None:
            results[name] = models[name]()

        calls = {name: functools.partial(forward, name) for name in models}
        samples = interleave(calls, base.plan, base.device)
        mine, its = (f"{report.milliseconds(1e3 * quantile(s, 0.5))} ms" for s in samples.values())
        what = f"{LAYERS} layers of {width}x{width}"
        figure = median_ratio(samples["torch"], samples["ours"])
        yield Claim(what, figure, ">=", 5.0, "x", mine, its, against="torch spectral_norm"), []
        yield Claim(f"{what}, sigma apart", apart, "<=", 1e-6, ""), []


WHOLE = (("llama-3m", 2.2), ("gpt2-small", 2.2))


def _muon(base: Request) -> Iterator[Found]:
    for model, target in WHOLE:
        rows = measure(replace(base, name="muon", workload=MODELS[model], kinds=("torch",)))
        yield compare(rows, MUON, f"muon, a step of {model}", ">=", target), rows


def _kernels(base: Request) -> Iterator[Found]:
    """Compare steps with their kernels: loops, checks and torch's elementwise passes are extra."""
    plan = base.plan._replace(seconds=1.0)  # short, because there are many steps
    for name in STEPS:
        rows = measure(replace(base, name=name, workload=MODELS["llama-3m"], kinds=("floor",),
                               refcheck=False, plan=plan))  # fmt: skip
        yield compare(rows, KERNELS, f"{name}, a step of llama-3m", "<=", 1.1), rows


# (optimizer, telemetry, target) to compare with plain Muon
BESIDE_MUON = (("NorMuon", 0, 1.1), ("AdaMuon", 0, 1.1), ("Muon", 10, 1.02))


def _steps(base: Request) -> Iterator[Found]:
    """Compare ten steps of each in shared rounds; telemetry=10 measures one step of ten."""
    workload = MODELS["llama-3m"]

    def ten(optimizer: str, telemetry: int = 0) -> Callable[[], Any]:
        params = Model(workload, Inputs(device=base.device)).parameters()
        made = REGISTRY[optimizer](params, lr=0.02, telemetry=telemetry)
        return lambda: [made.step() for _ in range(10)]

    calls = {"Muon": ten("Muon")}
    calls |= {f"{n}{' with telemetry' * (t > 0)}": ten(n, t) for n, t, _ in BESIDE_MUON}
    samples = interleave(calls, base.plan, base.device)
    muon, *others = samples
    its = f"{report.milliseconds(100 * quantile(samples[muon], 0.5))} ms"
    for name, (*_, target) in zip(others, BESIDE_MUON, strict=True):
        mine = f"{report.milliseconds(100 * quantile(samples[name], 0.5))} ms"
        figure = median_ratio(samples[name], samples[muon])
        yield Claim(f"{name}, a step of llama-3m", figure, "<=", target, "x", mine, its,
                    against="Muon"), []  # fmt: skip


def _imports(base: Request) -> Iterator[Found]:
    seconds, woke = import_times()
    took = quantile(seconds, 0.5) * 1e3
    yield Claim("import orthonorm after torch", took, "<=", 150.0, " ms"), []
    yield Claim("CUDA initialized by the import", float(woke), "<=", 0.0, ""), []


SECTIONS: tuple[Section, ...] = (
    (
        "Newton-Schulz, 5 steps of (3.4445, -4.775, 2.0315), float32 input,\n"
        "against torch.optim.Muon's function (bfloat16, one matrix after another)",
        _polynomials,
    ),
    ("Newton-Schulz against the fastest package installed, in the same dtype", _packages),
    ("Newton-Schulz, odd sizes against multiples of 32", _odd_sizes),
    ("Conda step between refreshes, float32, against the eager form with three products", _conda),
    ("K2 over 85 M float32 elements, against the same reads and copies by torch", _moments),
    ("Power iteration over 340 MB of float32 matrices", _power),
    ("Spectral normalization of all layers in a forward, against torch's parametrization", _layers),
    ("Muon's step against torch.optim.Muon's", _muon),
    ("Steps of 3 M parameters, against Muon's", _steps),
    ("Steps against their kernels alone", _kernels),
    ("Import", _imports),
)


def run_claims(plan: Plan, device: str, limits: Mapping[str, float]) -> Iterator[Found]:
    """Measure and print every promise, section by section; yield each claim with its records."""
    base = Request("newton_schulz", parse("1x1"), plan=plan, device=device, limits=limits)
    claims: list[Claim] = []
    for title, section in SECTIONS:
        found = []
        for claim, rows in section(base):
            found.append(claim)
            yield claim, rows
        claims += found
        lines = report.align([HEAD, *(claim.cells() for claim in found)])
        print("\n".join([title, *("  " + line for line in lines), ""]), flush=True)
    print(f"{sum(claim.held for claim in claims)} of {len(claims)} held in this run\n")
