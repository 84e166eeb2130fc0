"""What keeps a Monitor from stopping the training it watches."""

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
    """A MonitorWarning; logged instead where warnings are errors: a monitor raises nothing."""
    try:
        warnings.warn(text, MonitorWarning, stacklevel=3)
    except MonitorWarning:
        logging.getLogger("orthonorm.monitor").warning(text)


def warn_of(row: Row) -> None:
    """A MonitorWarning of an alarm."""
    of = f"{row.metric} of {row.kind} {row.name} is {row.value:.3g}"
    if row.metric == "sign_diversity":
        of += ", these inputs lie on one side of their layer's top singular vector"
    warn(f"monitor: alarm at step {row.step}: {of}")


class Guard:
    """Counts what fails, by name, and reports each once."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self._reported: set[str] = set()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Goes on after whatever fails inside."""
        try:
            yield
        except Exception as error:
            self.failures[what] += 1
            self.report(what, f"{type(error).__name__}: {error}")

    def report(self, what: str, text: str) -> None:
        """Warns the first time that it is called for `what`."""
        if what not in self._reported:
            self._reported.add(what)
            warn(f"monitor: {what}: {text}")
