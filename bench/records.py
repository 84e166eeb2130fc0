"""Records: the one type between measurements and outputs.

    measure -> Record -> Run (a JSON file) -> table, CSV, Markdown, page, plots, comparison, README

A Record has the figures of one candidate on one workload. A Run has the records of one command and
its machine. A Run is read back as it was written, so the outputs of a file and of a fresh
measurement are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .timing import quantile

FORMAT = "orthonorm-bench-2"
NOISY = 1.25  # rows with a larger p90 / p10 are flagged
# Rows are also flagged if medians of the halves of their rounds, or of passes, differ by more than
# this. Of 182 rows above 1 ms 54 differed by more than 5 % between two runs of `--quick`; a limit
# of 0.05 flagged 44 of them, this one 52 (2026-11).
DRIFT = 0.03
ENOUGH = 5  # rounds; the spread of fewer says little, so such rows are flagged too


@dataclass(frozen=True)
class Record:
    """The figures of one candidate; `note` says why there are none.

    Times are milliseconds per call, but for `host_us`.

    Attributes:
        sweep: value of a sweep, such as "n=512"; threads: torch's, if they were chosen.
        kind: ours, backend (ours from another backend), reference, torch, exact, package,
            compiled, or floor (the machine's own time for the same bytes or products).
        drift: median of the later half of the rounds over that of the earlier, minus 1. For rows
            that were measured again: the largest median over the least, minus 1.
        ratio: its median over ours; round_ratio: the median over rounds of its time over ours.
        cold_ms: with the L2 cache flushed; graph_ms: replayed from a CUDA graph; host_us: until the
            call returns to the host (CUDA); extra_mib: peak memory of a call.
        flops, bytes: nominal work and least traffic; ceiling: name of the machine's rate that
            binds; of_ceiling: the time that this rate allows over the median.
        error: relative Frobenius error to the float64 reference; polar_error: relative distance to
            the polar factor; sigma_min, sigma_max: extreme singular values of the result.
    """

    name: str
    shape: str
    dtype: str
    backend: str
    kind: str
    spectrum: str = "gaussian"
    precision: str = ""
    sweep: str = ""
    threads: int | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    rounds: int | None = None
    drift: float | None = None
    ratio: float | None = None
    round_ratio: float | None = None
    cold_ms: float | None = None
    graph_ms: float | None = None
    host_us: float | None = None
    extra_mib: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    ceiling: str = ""
    of_ceiling: float | None = None
    error: float | None = None
    polar_error: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    note: str = ""
    command: str = ""

    @property
    def group(self) -> tuple[str, ...]:
        """Values shared by the candidates of one comparison."""
        return (self.name, self.shape, self.dtype, self.spectrum, self.precision, self.sweep,
                str(self.threads or ""))  # fmt: skip

    @property
    def key(self) -> tuple[str, ...]:
        """Values shared with the same row of another run."""
        return (*self.group, self.backend)

    @property
    def noisy(self) -> bool:
        """True if its spread is above NOISY, its drift above DRIFT, or its rounds below ENOUGH."""
        if self.median_ms is None or self.p10_ms is None or self.p90_ms is None:
            return False
        spread, few = self.p90_ms > NOISY * self.p10_ms, (self.rounds or ENOUGH) < ENOUGH
        return spread or few or abs(self.drift or 0.0) > DRIFT

    @property
    def rate(self) -> float | None:
        """Nominal FLOP/s; for rows without arithmetic the least bytes per second."""
        work = self.flops or self.bytes
        return work / self.median_ms * 1e3 if self.median_ms and work else None

    @property
    def unit(self) -> str:
        return "FLOP/s" if self.flops else "B/s"


@dataclass
class Run:
    """The results of one command.

    The machine, its ceilings (FLOP/s by dtype, B/s of "copy"), the records, and the promises of
    `bench claims` with their targets.
    """

    environment: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        e = self.environment
        return f"{e['device']}, {e['threads']} threads, torch {e['torch']}, {e['date'][:10]}"

    def save(self, path: Path) -> None:
        """Write the run to `path` by a file that is moved there, so that it is never partial."""
        records = [compact(record) for record in self.records]
        data = {"format": FORMAT, "environment": self.environment, "ceilings": self.ceilings,
                "records": records, "claims": self.claims}  # fmt: skip
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(partial, path)


def compact(record: Record) -> dict[str, Any]:
    """Return a record as JSON data without the fields that have their default."""
    defaults = {f.name: f.default for f in fields(Record)}
    return {k: v for k, v in asdict(record).items() if v != defaults[k]}


def load(path: Path) -> Run:
    """Read a run from its file; raise ValueError, with the reason, for any other file."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"bench: cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"bench: {path} is not JSON") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ValueError(f"bench: {path} has format {found!r}, not {FORMAT!r}: run it again")
    try:
        records = [Record(**r) for r in data["records"]]
        return Run(dict(data["environment"]), dict(data["ceilings"]), records, data["claims"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"bench: {path} is damaged: {error}") from None


def grouped(records: Iterable[Record]) -> list[list[Record]]:
    """Return the records of each comparison as a list, in the order of measurement."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    return list(groups.values())


def joined(runs: Sequence[Run]) -> Run:
    """Join several runs of one command."""
    rates = [run.ceilings for run in runs]
    ceilings = {name: max(r.get(name, 0.0) for r in rates) for name in rates[0]}
    environment = runs[0].environment | {"processes": len(runs)}
    return Run(environment, ceilings, one_each(r for run in runs for r in run.records))


def one_each(records: Iterable[Record]) -> list[Record]:
    """Join records of the same row.

    The result has the median of their medians, the least p10 and the largest p90. Its drift is the
    largest median over the least, minus 1.
    """
    by_key: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        by_key.setdefault(record.key, []).append(record)
    return [_join(some) if len(some) > 1 else some[0] for some in by_key.values()]


def _join(records: Sequence[Record]) -> Record:
    timed = [r for r in records if r.median_ms and r.p10_ms and r.p90_ms]
    if not timed:
        return records[0]
    medians = [r.median_ms or 0.0 for r in timed]
    ratios = [r.ratio for r in timed if r.ratio]
    rounds = [r.round_ratio for r in timed if r.round_ratio]
    reached = [r.of_ceiling for r in timed if r.of_ceiling]
    return replace(
        timed[0], median_ms=quantile(medians, 0.5), p10_ms=min(r.p10_ms or 0.0 for r in timed),
        p90_ms=max(r.p90_ms or 0.0 for r in timed), rounds=sum(r.rounds or 0 for r in timed),
        drift=max(medians) / min(medians) - 1,
        ratio=quantile(ratios, 0.5) if ratios else None,
        round_ratio=quantile(rounds, 0.5) if rounds else None,
        of_ceiling=quantile(reached, 0.5) if reached else None,
    )  # fmt: skip
