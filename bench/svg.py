"""Plots as SVG text: logarithmic scatters and horizontal bars, drawn without any library.

Marks have a <title>, which browsers show on hovering. Colors are CSS classes (`page.STYLE`), so
that a page can change them with its color scheme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import NamedTuple

from .figures import Bars, Scatter

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48


class _Axis(NamedTuple):
    """A logarithmic axis from low to high, drawn from pixel start to pixel end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return powers of ten within the axis; on short axes also 2 and 5 times them."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1,) if last - first > 2 else (1, 2, 5)
        every = 1 + (last - first) // 7
        candidates = [s * 10.0**e for e in range(first, last + 1, every) for s in steps]
        return [t for t in candidates if self.low <= t <= self.high]


def _axis(values: Iterable[float], start: float, end: float) -> _Axis:
    """Return an axis that holds the values with some space at both ends."""
    listed = list(values)
    low, high = min(listed), max(listed)
    pad = max((high / low) ** 0.06, 1.1)
    return _Axis(low / pad, high * pad, start, end)


def number(value: float) -> str:
    """Format a tick briefly: large numbers with a prefix ("2G"), small ones with an exponent."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}" if value >= 1e-2 else f"{value:.0e}".replace("e-0", "e-")


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """Return an SVG text element; `more` is added to its attributes."""
    escaped = html.escape(words)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escaped}</text>'


def _frame(x: _Axis, y: _Axis, figure: Scatter) -> list[str]:
    parts = []
    for t in x.ticks():
        at = x.at(t)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end}" y2="{y.start}"/>'
        )
        parts.append(text(at, y.start + 16, number(t)))
    for t in y.ticks():
        at = y.at(t)
        parts.append(
            f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(text(x.start - 6, at + 4, number(t), "end"))
    middle = (y.start + y.end) / 2
    parts.append(text((x.start + x.end) / 2, y.start + 36, figure.x_label))
    turned = f' transform="rotate(-90 14 {middle:.1f})"'
    parts.append(text(14, middle, figure.y_label, more=turned))
    return parts


def _scatter(figure: Scatter) -> str:
    """Draw points on two logarithmic axes, with lines behind them."""
    shown = figure.marks
    corners = [p for line in figure.lines for p in line.points]
    x = _axis([m.x for m in shown] + [p[0] for p in corners], LEFT, WIDTH - RIGHT)
    y = _axis([m.y for m in shown] + [p[1] for p in corners], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', *_frame(x, y, figure)]
    for line in figure.lines:
        placed = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in line.points)
        a, b = line.points[-1]
        parts.append(f'<polyline class="limit" points="{placed}"/>')
        parts.append(text(x.at(a) - 4, y.at(b) - 5, line.label, "end", ' class="label"'))
    for m in sorted(shown, key=lambda m: m.color == "ours"):  # ours last, so that they are on top
        parts.append(
            f'<circle class="{m.color}" cx="{x.at(m.x):.1f}" cy="{y.at(m.y):.1f}" r="4.5">'
            f"<title>{html.escape(m.title)}</title></circle>"
        )
    return "\n".join([*parts, "</svg>"])


def _bars(figure: Bars) -> str:
    """Draw horizontal bars on a logarithmic axis around 1, under headings."""
    shown, reference = figure.rows, 1.0
    start = 252.0
    x = _axis([reference, *(r.length for r in shown)], start, WIDTH - 60.0)
    parts, y, heading = [], 8.0, ""
    for r in shown:
        if r.heading != heading:
            heading, y = r.heading, y + 22
            parts.append(text(4, y - 4, heading, "start", ' class="heading"'))
        a, b = sorted((x.at(reference), x.at(r.length)))
        parts.append(text(start - 8, y + 12, r.label, "end"))
        parts.append(
            f'<rect class="{r.color}" x="{a:.1f}" y="{y + 2:.1f}" width="{max(b - a, 1):.1f}" '
            f'height="12" rx="2"/>'
        )
        parts.append(text(b + 5, y + 12, f"{r.length:.2f}x", "start"))
        y += 17
    at = x.at(reference)
    parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="8" y2="{y + 4:.0f}"/>')
    return "\n".join([f'<svg viewBox="0 0 {WIDTH} {y + 12:.0f}" role="img">', *parts, "</svg>"])


def draw(figure: Scatter | Bars) -> str:
    """Return a plot as SVG text."""
    return _scatter(figure) if isinstance(figure, Scatter) else _bars(figure)
