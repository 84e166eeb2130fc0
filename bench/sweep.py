"""Sweeps over a size, the batch or the number of threads, and the fitted exponent of the time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .records import Record

THREADS = "threads"
DEFAULTS = {"n": "nxn", "m": "256xm", "b": "bx64x64"}  # shapes to sweep if there is no --shape
_SIDE = re.compile(r"(\d*)([a-wyz])")


class Sweep(NamedTuple):
    """The letter (or "threads") that is varied, and its values."""

    variable: str
    values: tuple[int, ...]


def parse(text: str) -> Sweep:
    """Parse the text of a sweep.

    "n=64:8192" doubles from 64 to 8192, "n=64:512:64" goes in steps of 64, and "threads=1:8"
    varies torch's threads. Raise ValueError for any other text.
    """
    match = re.fullmatch(r"(threads|[a-wyz])=(\d+):(\d+)(?::(\d+))?", text)
    low, high = (int(match[2]), int(match[3])) if match else (0, 0)
    if not match or not 1 <= low <= high or match[4] == "0":
        raise ValueError(
            f"must be LETTER=LOW:HIGH (doubling) or LETTER=LOW:HIGH:STEP, of a letter "
            f"in --shape such as n of 64xnx4n, or of threads, got {text!r}"
        )
    if match[4]:
        return Sweep(match[1], tuple(range(low, high + 1, int(match[4]))))
    return Sweep(match[1], tuple(low << i for i in range((high // low).bit_length())))


def substitute(template: str, variable: str, value: int) -> str:
    """Return a shape's text with every side and count such as `4n` replaced by its number."""
    words = re.split(r"([x*+])", template)
    used = False
    for i, word in enumerate(words):
        side = _SIDE.fullmatch(word)
        if side and side[2] == variable:
            words[i], used = str(int(side[1] or 1) * value), True
    if not used:
        raise ValueError(f"bench: shape {template!r} has no side {variable} to sweep")
    return "".join(words)


class Fit(NamedTuple):
    """median = constant * value^exponent by least squares of logarithms; r2 is the fit's R^2."""

    exponent: float
    constant_ms: float
    r2: float


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Fit a power law to points (value, milliseconds); None for fewer than two values."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    xx = sum((x - mean_x) ** 2 for x, _ in logs)
    xy = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    yy = sum((y - mean_y) ** 2 for _, y in logs)
    return Fit(xy / xx, math.exp(mean_y - xy / xx * mean_x), xy * xy / (xx * yy) if yy else 1.0)


def series(records: Iterable[Record]) -> dict[tuple[str, ...], list[tuple[float, float]]]:
    """Return points (value, milliseconds) of all sweeps.

    Keys are (name, dtype, precision, backend, variable).
    """
    points: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for r in records:
        if r.sweep and r.median_ms:
            variable, _, value = r.sweep.partition("=")
            key = (r.name, r.dtype, r.precision, r.backend, variable)
            points.setdefault(key, []).append((float(value), r.median_ms))
    return points


def report(records: Iterable[Record]) -> list[str]:
    """Return a line per series: the exponent over all values, and over the last two."""
    lines = []
    for (name, dtype, precision, backend, variable), points in series(records).items():
        whole, last = fit(points), fit(sorted(points)[-2:])
        if whole and last:
            what = " ".join(p for p in (name, dtype, precision, backend) if p)
            lines.append(
                f"{what}: time ~ {variable}^{whole.exponent:.2f} (r2 {whole.r2:.3f}), "
                f"at the end {variable}^{last.exponent:.2f}"
            )
    return lines
