"""Reports of records as text: aligned tables, CSV files that rows are appended to, Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .records import DRIFT, ENOUGH, NOISY, Record, Run, grouped

ENVIRONMENT = ("date", "orthonorm", "commit", "torch", "device", "cores")
COLUMNS = (*ENVIRONMENT, *(f.name for f in fields(Record)), "noisy", "rate", "unit")
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def milliseconds(ms: float) -> str:
    """Format milliseconds with fewer digits the longer they are."""
    digits = 4 if ms < 1 else 3 if ms < 10 else 2 if ms < 100 else 0
    return f"{ms:.{digits}f}"


def scaled(value: float, unit: str) -> str:
    """Format a value with a prefix of its unit, such as "1.5 GFLOP/s"."""
    for scale, prefix in _SCALES:
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _spread(r: Record) -> str:
    """Format p10 and p90 relative to the median; "!" marks a noisy row."""
    if not r.median_ms or r.p10_ms is None or r.p90_ms is None:
        return ""
    low, high = (round(100 * (p / r.median_ms - 1)) for p in (r.p10_ms, r.p90_ms))
    return f"{min(low, 0):-d} {high:+d}%" + ("!" if r.noisy else " ")


def _ratio(r: Record) -> str:
    return "" if r.ratio is None or r.kind == "ours" else f"{r.ratio:.2f}x"


def _ceiling(r: Record) -> str:
    short = {"memory": "mem", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    name = short.get(r.ceiling, r.ceiling)
    return "" if r.of_ceiling is None else f"{r.of_ceiling:.0%} {name}"


def _sigmas(r: Record) -> str:
    if r.sigma_min is None or r.sigma_max is None:
        return ""
    return f"{r.sigma_min:.2g}-{r.sigma_max:.2g}"


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def cells(members: Sequence[Record]) -> list[list[str]]:
    """Return the head and the rows of a group's table, without empty columns."""
    largest = max((r.rate or 0.0 for r in members), default=0.0)
    scale, prefix = (1e12, "T") if largest >= 1e13 else (1e9, "G")
    columns = {
        "backend": [r.backend for r in members],
        "ms": [milliseconds(r.median_ms or 0.0) for r in members],
        "p10 p90": [_spread(r) for r in members],
        "ours is": [_ratio(r) for r in members],
        prefix + members[0].unit: [_number(r.rate and r.rate / scale, ".3g") for r in members],
        "ceiling": [_ceiling(r) for r in members],
        "cold": [_number(r.cold_ms, ".3g") for r in members],
        "graph": [_number(r.graph_ms, ".3g") for r in members],
        "host us": [_number(r.host_us, ".3g") for r in members],
        "MiB": [_number(r.extra_mib, ".3g") for r in members],
        "error": [_number(r.error, ".1e") for r in members],
        "polar": [_number(r.polar_error, ".2g") for r in members],
        "sigmas": [_sigmas(r) for r in members],
    }
    filled = {head: cells for head, cells in columns.items() if any(cells)}
    return [list(filled), *(list(row) for row in zip(*filled.values(), strict=True))]


def align(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Pad columns to their widest cell; the first `left` ones are aligned left, others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def legend(records: Sequence[Record]) -> list[str]:
    """Return lines that explain the columns of the tables of these records."""
    lines = []
    if any(r.ratio is not None for r in records):
        lines.append("ours is 2x: that candidate takes twice our time")
    if any(r.of_ceiling is not None for r in records):
        lines.append("ceiling: share of the machine's rate that binds, of nominal work")
    if any(r.error is not None for r in records):
        lines.append("error: |result - reference in float64| / |reference|")
    if any(r.polar_error is not None for r in records):
        lines.append("polar: distance to the polar factor, which a few steps only approach;")
        lines.append("sigmas: smallest and largest singular value of the result")
    if any(r.noisy for r in records):
        lines.append(
            f"!: noisy, p90 above {NOISY} p10, medians of halves or passes over {DRIFT:.0%} apart, "
            f"or fewer than {ENOUGH} rounds"
        )
    return lines


def title(members: Sequence[Record]) -> str:
    """Return the heading of a group: op, shape, dtype and other settings."""
    return "  ".join(part for part in members[0].group[:6] if part) + (
        f"  threads={members[0].threads}" if members[0].threads else ""
    )


def table(records: Iterable[Record]) -> str:
    """Return a block per op, shape and dtype.

    "ours is 2x" means that this candidate takes twice our time.
    """
    blocks = []
    for members in grouped(records):
        timed = [r for r in members if r.median_ms is not None]
        lines = align(cells(timed)) if timed else []
        notes = [f"{r.backend}: {r.note}" for r in members if r.note]
        again = [members[0].command] if members[0].command else []
        blocks.append("\n".join([title(members), *("  " + x for x in (*lines, *notes, *again))]))
    return "\n\n".join(blocks)


def markdown(run: Run) -> str:
    """Return the same blocks as Markdown tables, under a heading that names the machine."""
    parts = [f"## {run.title}"]
    if run.ceilings:
        limits = ", ".join(
            f"{k} {scaled(v, 'B/s' if k == 'copy' else 'FLOP/s')}" for k, v in run.ceilings.items()
        )
        parts.append(f"Ceilings: {limits}.")
    for members in grouped(run.records):
        timed = [r for r in members if r.median_ms is not None]
        parts.append(f"### {title(members)}")
        if timed:
            head, *rows = cells(timed)
            rule = ["---", *["---:"] * (len(head) - 1)]
            lines = ("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
            parts.append("\n".join(lines))
        parts += [f"- {r.backend}: {r.note}" for r in members if r.note]
        parts.append(f"`{members[0].command}`")
    return "\n\n".join(parts) + "\n"


def flat(record: Record, environment: dict[str, Any]) -> dict[str, Any]:
    """Return a record and its environment as one flat row."""
    derived = {"noisy": record.noisy, "rate": record.rate, "unit": record.unit}
    found = {k: environment.get(k) for k in ENVIRONMENT} | asdict(record) | derived
    return {column: found[column] for column in COLUMNS}


def append_csv(path: Path, records: Iterable[Record], environment: dict[str, Any]) -> None:
    """Append records to a CSV file; create it with a header if it is missing or empty."""
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(flat(record, environment) for record in records)


def check_csv(path: Path) -> None:
    """Raise ValueError if the file exists and has other columns."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="") as file:
        head = next(csv.reader(file), [])
    if tuple(head) != COLUMNS:
        raise ValueError(f"bench: {path} has other columns than this version writes")
