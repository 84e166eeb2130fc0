"""The page's plots as PNG files, drawn with matplotlib (part of the `train` extra)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .figures import COLORS, Bars, Scatter, figures
from .records import Run

INK = {
    "ours": "#d1495b", "reference": "#8d99ae", "torch": "#2e6f95", "package": "#4d9078",
    "exact": "#9a6fb0", "floor": "#c9a227",
}  # fmt: skip


def check() -> None:
    """Raise ValueError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("bench: --plots needs matplotlib; pip install matplotlib, or use --html")


def _legend(axes: Any, used: set[str]) -> None:
    for color, words in COLORS.items():
        if color in used:
            axes.plot([], [], "o", color=INK[color], label=words)
    axes.legend(frameon=False, fontsize=8)


def _scatter(axes: Any, figure: Scatter) -> None:
    for line in figure.lines:
        axes.plot(*zip(*line.points, strict=True), "--", color=INK["floor"], linewidth=1)
        axes.annotate(line.label, line.points[-1], fontsize=7, ha="right", va="bottom")
    for m in figure.marks:
        axes.plot(m.x, m.y, "o", color=INK[m.color], alpha=0.8, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel=figure.x_label, ylabel=figure.y_label)
    axes.grid(alpha=0.25)
    _legend(axes, {m.color for m in figure.marks})


def _bars(axes: Any, figure: Bars) -> None:
    rows = figure.rows[::-1]
    at = range(len(rows))
    axes.barh(at, [r.length - 1 for r in rows], left=1, color=[INK[r.color] for r in rows])
    axes.set_yticks(at, [f"{r.heading}  {r.label}" for r in rows], fontsize=7)
    axes.axvline(1, color=INK["floor"], linestyle="--", linewidth=1)
    axes.set(xscale="log")
    for y, r in zip(at, rows, strict=True):
        axes.annotate(f" {r.length:.2f}x", (max(r.length, 1), y), va="center", fontsize=7)
    _legend(axes, {r.color for r in rows})


def write(folder: Path, run: Run) -> None:
    """Write a PNG for each plot, named after it."""
    check()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    for figure in figures(run):
        tall = 4.8 if isinstance(figure, Scatter) else 1.5 + 0.2 * len(figure.rows)
        canvas, axes = pyplot.subplots(figsize=(8, tall), layout="constrained")
        axes.set_title(figure.caption, fontsize=8, loc="left", wrap=True)
        if isinstance(figure, Scatter):
            _scatter(axes, figure)
        else:
            _bars(axes, figure)
        canvas.savefig(folder / f"{figure.name}.png", dpi=150)
        pyplot.close(canvas)
