"""Reports: an aligned table for the terminal, CSV that grows, JSON that says everything."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .measure import Row

FORMAT = "orthonorm-bench-1"
COLUMNS = (
    "date", "commit", "torch", "device", "threads", "name", "shape", "dtype", "spectrum",
    "precision", "backend", "kind", "median_ms", "p10_ms", "p90_ms", "rounds", "noisy", "ratio",
    "round_ratio", "rate", "unit", "error", "note", "command",
)  # fmt: skip
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def record(row: Row, environment: dict[str, Any]) -> dict[str, Any]:
    """A row as flat data."""
    time = row.time
    figures = {
        "median_ms": time and time.median * 1e3,
        "p10_ms": time and time.p10 * 1e3,
        "p90_ms": time and time.p90 * 1e3,
        "rounds": time and time.rounds,
        "noisy": time and time.noisy,
    }
    found = {**environment, **vars(row), **figures}
    return {column: found.get(column) for column in COLUMNS}


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    digits = 4 if ms < 1 else 3 if ms < 10 else 2 if ms < 100 else 0
    return f"{ms:.{digits}f}"


def rate(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    for scale, prefix in _SCALES:
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def cells(row: Row) -> tuple[str, ...]:
    """backend, median ms, p10-p90, ratio to ours, rate, error."""
    time = row.time
    if time is None:
        return (row.backend, "-", "", "", "", "")
    spread = f"{milliseconds(time.p10)}-{milliseconds(time.p90)}" + ("!" if time.noisy else "")
    ratio = "" if row.ratio is None or row.kind == "ours" else f"{row.ratio:.2f}x"
    error = "" if row.error is None else f"{row.error:.1e}"
    return (row.backend, milliseconds(time.median), spread, ratio, rate(row.rate, row.unit), error)


HEAD = ("backend", "ms", "p10-p90", "ours is", "rate", "error")


def align(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns padded to their widest cell, the first `left` ones to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def table(rows: Iterable[Row]) -> str:
    """One block per op, shape and dtype; "ours is 2x" means that candidate takes twice our time."""
    blocks = []
    groups = itertools.groupby(rows, lambda r: (r.name, r.shape, r.dtype, r.spectrum, r.precision))
    for (name, shape, dtype, spectrum, precision), group in groups:
        members = list(group)
        title = "  ".join((name, shape, dtype, spectrum, precision)).rstrip()
        lines = align([HEAD, *(cells(row) for row in members)])
        notes = [f"{row.backend}: {row.note}" for row in members if row.note]
        blocks.append("\n".join([title, *("  " + line for line in lines + notes)]))
    return "\n\n".join(blocks)


def append_csv(path: Path, rows: Iterable[Row], environment: dict[str, Any]) -> None:
    """Rows at the end of a CSV file, made with a header if it is not there."""
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(record(row, environment) for row in rows)


def check_csv(path: Path) -> None:
    """ValueError if a file is there that another format wrote."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="") as file:
        head = next(csv.reader(file), [])
    if tuple(head) != COLUMNS:
        raise ValueError(f"bench: {path} has other columns than this version writes")


def write_json(path: Path, rows: Iterable[Row], environment: dict[str, Any], **more: Any) -> None:
    """Environment and rows, everything that was measured."""
    shared = set(environment)
    flat = [{k: v for k, v in record(row, environment).items() if k not in shared} for row in rows]
    data = {"format": FORMAT, "environment": environment, "rows": flat, **more}
    path.write_text(json.dumps(data, indent=1) + "\n")
