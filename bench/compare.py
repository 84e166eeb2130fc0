"""Comparison of two runs: rows that moved beyond noise, and which of these are failures.

A time moved if each run's median lies outside the other's p10 to p90, and the medians differ by
more than the threshold. An error grew if it is more than twice the old one and above rounding.
"""

from __future__ import annotations

from typing import NamedTuple

from .records import Record, Run
from .report import align, milliseconds

ROUNDING = 1e-12  # errors below this are rounding of float64 itself
SHORT = 0.01  # milliseconds: calls below this are compared at twice the threshold


class Move(NamedTuple):
    """A row that changed between two runs."""

    record: Record
    old: Record
    change: float  # new median over old, minus 1
    what: str  # slower, faster, wrong, gone, noisy

    @property
    def failed(self) -> bool:
        """True if one of ours got slower, wrong or is gone.

        A peer that moved tells of the machine or of its own version.
        """
        return self.what in ("slower", "wrong", "gone") and self.record.kind == "ours"


def _outside(median: float, other: Record) -> bool:
    """True if a median lies outside the p10 to p90 of another record."""
    assert other.p10_ms is not None and other.p90_ms is not None
    return not other.p10_ms <= median <= other.p90_ms


def grew(new: float | None, old: float | None) -> bool:
    """True if an error is more than twice the old one, and above rounding."""
    return new is not None and old is not None and new > max(2 * old, ROUNDING)


def move(new: Record, old: Record, threshold: float) -> Move | None:
    """Return the move of one row; None if nothing changed."""
    if old.median_ms is None:
        return None
    if new.median_ms is None:
        return Move(new, old, 0.0, "gone")
    change = new.median_ms / old.median_ms - 1
    if grew(new.error, old.error):
        return Move(new, old, change, "wrong")
    allowed = threshold if old.median_ms > SHORT else 2 * threshold
    if not -allowed / (1 + allowed) <= change <= allowed:
        if _outside(new.median_ms, old) and _outside(old.median_ms, new):
            return Move(new, old, change, "slower" if change > 0 else "faster")
        return Move(new, old, change, "noisy")
    return None


def check_comparable(new: Run, old: Run) -> None:
    """Raise ValueError for runs of different devices or threads, whose times do not compare."""
    for name in ("device", "threads"):
        a, b = new.environment.get(name), old.environment.get(name)
        if a != b:
            raise ValueError(f"bench: runs of different {name} do not compare: {a!r} and {b!r}")


def compare(new: Run, old: Run, threshold: float) -> tuple[list[Move], int]:
    """Return the moves, failures first, and the number of rows that both runs have."""
    before = {r.key: r for r in old.records}
    shared = [(r, before[r.key]) for r in new.records if r.key in before]
    moves = [m for pair in shared if (m := move(*pair, threshold)) is not None]
    return sorted(moves, key=lambda m: (not m.failed, -abs(m.change))), len(shared)


def report(new: Run, old: Run, threshold: float) -> tuple[str, bool]:
    """Return the comparison as text, and True if one of ours is slower, wrong or gone."""
    moves, shared = compare(new, old, threshold)
    lines = [f"{shared} rows in common with {old.title}, commit {old.environment.get('commit')}"]
    for name, rate in new.ceilings.items():
        before = old.ceilings.get(name)
        if before and abs(rate / before - 1) > threshold:
            lines.append(f"the machine itself: {name} ceiling {rate / before:.2f} of what it was")
    if moves:
        rows = [("", "backend", "was ms", "is ms", "change", "error was", "is")]
        for m in moves:
            times = (milliseconds(r.median_ms) if r.median_ms else "-" for r in (m.old, m.record))
            errors = (f"{r.error:.1e}" if r.error is not None else "" for r in (m.old, m.record))
            what = " ".join(part for part in m.record.group if part)
            rows.append((f"{m.what:6} {what}", m.record.backend, *times, f"{m.change:+.1%}",
                         *errors))  # fmt: skip
        lines += align(rows, left=2)
    failed = [m for m in moves if m.failed]
    lines.append(
        f"{len(failed)} of ours slower than {threshold:.0%} beyond noise, wrong or gone; "
        f"{sum(m.what == 'faster' for m in moves)} faster; "
        f"{sum(m.what == 'noisy' for m in moves)} apart but within noise"
    )
    return "\n".join(lines), bool(failed)
