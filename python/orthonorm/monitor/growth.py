"""An alarm for numbers that should not grow: norms of updates, weights or gradients."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from .. import _checks as check


class GrowthAlarm:
    """Alarm when a value > factor x the least median so far, `patience` times in a row.

    Medians are of the last `window` values. For ("updates", "frobenius") the alarm detects a
    learning rate that creeps up, or growing gradients, while the loss is still calm; Spectral
    Alignment detects neither. It does not detect an explosion within a few measurements, nor one
    at steady updates (drifting inputs). A warm-up or a restart of the schedule also raises it:
    begin measuring after them. A value that is not finite counts as grown and enters no median.
    After an alarm the history of that matrix starts anew.

    Args:
        factor: growth that is too much.
        window: values per median. With fewer values, only a value that is not finite has grown.
        patience: measurements in a row that have grown.

    Shapes: call it with a name and one number. Cost: a median of `window` numbers. Source:
    this project, for what Spectral Alignment does not detect (examples/watch_spectra.py).
    """

    def __init__(self, factor: float = 4.0, window: int = 5, patience: int = 2) -> None:
        name = "GrowthAlarm"
        check.number(name, "factor", factor, 1.0)
        check.integer(name, "window", window, 1)
        check.integer(name, "patience", patience, 1)
        self.factor, self.window, self.patience = factor, window, patience
        self._recent: dict[str, deque[float]] = {}
        self._least: dict[str, float] = {}
        self._high: dict[str, int] = {}

    def __call__(self, name: str, value: float) -> bool:
        """Return True if this value of the matrix `name` raises the alarm."""
        least = self._least.get(name, math.inf)
        grown = not math.isfinite(value) or value > self.factor * least
        self._high[name] = self._high.get(name, 0) + 1 if grown else 0
        if self._high[name] >= self.patience:
            for history in (self._recent, self._least, self._high):
                history.pop(name, None)
            return True
        recent = self._recent.setdefault(name, deque(maxlen=self.window))
        if math.isfinite(value):
            recent.append(value)
        if len(recent) == self.window:
            self._least[name] = min(least, median(recent))
        return False
