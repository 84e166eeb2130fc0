"""Handling of failures, so that a Monitor never stops the training that it watches."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from .records import Row


class MonitorWarning(UserWarning):
    """An alarm, or something that failed inside a Monitor."""


def warn(text: str) -> None:
    """Issue a MonitorWarning; log it where warnings are errors, because a monitor never raises."""
    try:
        warnings.warn(text, MonitorWarning, stacklevel=3)
    except MonitorWarning:
        logging.getLogger("orthonorm.monitor").warning(text)


def warn_of(row: Row) -> None:
    """Issue a MonitorWarning about an alarm, whose measurement is `row`."""
    of = f"{row.metric} of {row.kind} {row.name} is {row.value:.3g}"
    if row.metric == "sign_diversity":
        of += ", these inputs lie on one side of their layer's top singular vector"
    warn(f"monitor: alarm at step {row.step}: {of}")


class Guard:
    """Counter of failures by name, which warns of each name once."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self._reported: set[str] = set()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Catch, count and report exceptions of the `with` block; execution goes on after it."""
        try:
            yield
        except Exception as error:
            self.failures[what] += 1
            self.report(what, f"{type(error).__name__}: {error}")

    def report(self, what: str, text: str) -> None:
        """Warn at the first call for `what`; do nothing at later ones."""
        if what not in self._reported:
            self._reported.add(what)
            warn(f"monitor: {what}: {text}")
