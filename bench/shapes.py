"""Shapes: awkward ones for tests, those of real models for benchmarks, and shapes given as text.

A workload is the list of (batches of) matrices that one call works on. As text, `+` joins its
entries and `12*768x768` repeats one: "12*768x2304+500x32x32".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from .models import SHAPES, Shape


class Workload(NamedTuple):
    """A named list of shapes, each (..., rows, columns)."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def distinct(self) -> Workload:
        """Return the workload with each shape once, which is enough to measure an error."""
        return Workload(self.name, tuple(dict.fromkeys(self.shapes)))


MODELS = {name: Workload(name, shapes) for name, shapes in SHAPES.items()}

# Single shapes.
NAMED = (
    "768x3072", "768x2304", "1024x4096", "2048x2048", "12x768x768", "64x128x128", "500x64x64",
    "500x32x32", "768x768", "3072x768", "768x50257",
)  # fmt: skip

# For tests: one-element sides, primes, both orientations, batches, empty batches, empty sides.
AWKWARD: tuple[Shape, ...] = (
    (1, 1), (1, 7), (7, 1), (2, 3), (13, 29), (31, 17), (64, 64), (33, 131), (131, 67),
    (3, 5, 7), (2, 3, 19, 8), (4, 1, 5),
)  # fmt: skip
EMPTY: tuple[Shape, ...] = ((0, 5, 7), (2, 0, 4, 4), (0, 5), (5, 0), (3, 0, 4))


def parse(text: str) -> Workload:
    """Return the workload of a text: a model's name, "64x2048x768" or "12*768x768+768x3072"."""
    if text in MODELS:
        return MODELS[text]
    shapes: list[Shape] = []
    for part in text.split("+"):
        count, _, shape = part.rpartition("*")
        try:
            repeats = int(count) if count else 1
            sides = tuple(int(side) for side in shape.split("x"))
        except ValueError:
            repeats, sides = 0, ()
        if repeats < 1 or len(sides) < 2 or min(sides) < 0:
            raise ValueError(
                f"bench: shape must be a name ({', '.join(MODELS)}) or sides such as 64x2048x768, "
                f"repeated with 12*768x768 and joined by +, got {text!r}"
            )
        shapes += [sides] * repeats
    return Workload(text, tuple(shapes))


def describe(shapes: Iterable[Shape]) -> str:
    """Return the text of a list of shapes; equal neighbours are counted."""
    parts: list[tuple[Shape, int]] = []
    for shape in shapes:
        if parts and parts[-1][0] == shape:
            parts[-1] = (shape, parts[-1][1] + 1)
        else:
            parts.append((shape, 1))
    return "+".join((f"{n}*" if n > 1 else "") + "x".join(map(str, s)) for s, n in parts)
