"""Plots as data, which `svg.py` draws into the page and `plots.py` with matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from . import report
from .ceilings import COPY
from .records import Record, Run, grouped
from .sweep import report as sweep_report
from .sweep import series

# a color class for every kind of candidate, and its name in the legend
COLORS = {
    "ours": "orthonorm", "reference": "definition in plain torch", "torch": "torch",
    "package": "other packages", "exact": "exact decompositions", "floor": "this machine's floor",
}  # fmt: skip
_OF_KIND = {"backend": "ours", "compiled": "package"}


class Mark(NamedTuple):
    """A point: its place, its color class, and the text shown on hovering."""

    x: float
    y: float
    color: str
    title: str


class Line(NamedTuple):
    """A polyline, with a label at its last point."""

    points: tuple[tuple[float, float], ...]
    label: str


class Bar(NamedTuple):
    """A bar: its length (1 is neutral), color class, label, and the heading above it."""

    length: float
    color: str
    label: str
    heading: str


@dataclass(frozen=True)
class Scatter:
    """Points and lines on logarithmic axes."""

    name: str
    caption: str
    marks: tuple[Mark, ...]
    x_label: str
    y_label: str
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Bars:
    """Horizontal bars on a logarithmic axis around 1."""

    name: str
    caption: str
    rows: tuple[Bar, ...]


def _color(r: Record) -> str:
    return _OF_KIND.get(r.kind, r.kind)


def _named(r: Record) -> str:
    """Return the text that names a record on hovering."""
    return " ".join(p for p in (r.name, r.shape, r.dtype, r.precision, r.sweep, r.backend) if p)


def roofline(run: Run) -> Scatter:
    """Plot FLOP/s over FLOPs per byte, with the measured ceilings."""
    marks = tuple(
        Mark(r.flops / r.bytes, r.rate, _color(r), f"{_named(r)}: {report.scaled(r.rate, r.unit)}")
        for r in run.records
        if r.rate and r.flops and r.bytes
    )
    lines = []
    copy = run.ceilings.get(COPY)
    if marks and copy:
        low, high = min(m.x for m in marks), max(m.x for m in marks)
        for name, peak in run.ceilings.items():
            ridge = peak / copy
            left, right = min(low, ridge / 2), max(high, ridge * 2)
            if name != COPY:
                lines.append(Line(((left, copy * left), (ridge, peak), (right, peak)), name))
    return Scatter(
        "roofline",
        "Roofline. Dashed: ceilings measured in the same run. Forms that need fewer products than "
        "the nominal count pass them, as does work that stays in cache.",
        marks, "FLOPs per byte of least traffic", "nominal FLOP/s", tuple(lines),
    )  # fmt: skip


def bandwidth(run: Run) -> Bars:
    """Plot the bandwidth of memory-bound rows as a multiple of the measured copy."""
    rows = [
        Bar(r.of_ceiling, _color(r), r.backend, f"{r.name}  {r.shape}  {r.dtype}")
        for r in run.records
        if r.of_ceiling and r.ceiling == "memory" and not r.flops
    ]
    caption = "Passes over memory: bandwidth as a multiple of the measured copy (1x)."
    return Bars("bandwidth", caption, tuple(rows))


def speedup(run: Run) -> Bars:
    """Plot the times of others over ours."""
    rows: list[Bar] = []
    for members in grouped(run.records):
        heading = report.title(members).replace("  gaussian", "")
        rows += [
            Bar(r.ratio, _color(r), r.backend, heading)
            for r in members
            if r.ratio and r.kind not in ("ours", "floor", "reference")
        ]
    caption = "How many times our time the others take, shape by shape (longer is better for us)."
    return Bars("speedup", caption, tuple(rows))


def errors(run: Run) -> Scatter:
    """Plot errors over times."""
    marks = tuple(
        Mark(r.median_ms, r.error, _color(r), f"{_named(r)}: {r.median_ms:.3g} ms, {r.error:.1e}")
        for r in run.records
        if r.median_ms and r.error and r.kind != "floor"
    )
    caption = "Error against float64 over time: down and to the left is better."
    return Scatter("errors", caption, marks, "milliseconds", "relative error")


def sweeps(run: Run) -> Scatter:
    """Plot times over the quantity that a sweep varied."""
    colors = {r.backend: _color(r) for r in run.records}
    marks, lines = [], []
    for (name, dtype, _, backend, variable), points in series(run.records).items():
        lines.append(Line(tuple(sorted(points)), f"{name} {backend}"))
        what = f"{name} {dtype} {backend} {variable}"
        marks += [Mark(x, y, colors[backend], f"{what}={x:g}: {y:.3g} ms") for x, y in points]
    caption = "Sweep. " + "; ".join(sweep_report(run.records))
    return Scatter("sweep", caption, tuple(marks), "what was varied", "milliseconds", tuple(lines))


def figures(run: Run) -> list[Scatter | Bars]:
    """Return the plots for which the run has data."""
    made: tuple[Scatter | Bars, ...] = (
        speedup(run), errors(run), roofline(run), bandwidth(run), sweeps(run)
    )  # fmt: skip
    return [f for f in made if (f.marks if isinstance(f, Scatter) else f.rows)]
