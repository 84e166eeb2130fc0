"""Measurements of a Monitor: rows in memory, in files, in TensorBoard and as plots."""

from __future__ import annotations

import csv
import json
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One measurement: the value of `metric` at `step`, for the matrix `name` of a `kind`."""

    step: int
    kind: str
    name: str
    metric: str
    value: float


class Records:
    """Store of measurements: the last rows in memory, and all rows in a file and in TensorBoard.

    Args:
        keep: most rows in memory.
        out: a .csv file, or a .jsonl file of one object per line, to append rows to; or None.
        tensorboard: a folder, or an object with add_scalar(tag, value, step); or None.
    """

    def __init__(self, keep: int, out: str | Path | None, tensorboard: Any) -> None:
        self.rows: deque[Row] = deque(maxlen=keep)
        self.path = None if out is None else Path(out)
        if self.path is not None and self.path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"monitor: out must end in .csv or .jsonl, got {out}")
        self.writer = tensorboard
        if isinstance(tensorboard, (str, Path)):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard))

    def add(self, rows: list[Row]) -> None:
        """Keep the rows in memory, and append them to the file and to TensorBoard."""
        self.rows.extend(rows)
        if self.path is not None:
            new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                if self.path.suffix == ".jsonl":
                    file.writelines(json.dumps(as_json(row)) + "\n" for row in rows)
                else:
                    csv.writer(file).writerows([*([Row._fields] if new else []), *rows])
        if self.writer is not None:
            for row in rows:
                self.writer.add_scalar(f"{row.metric}/{row.kind}/{row.name}", row.value, row.step)

    def series(self, metric: str, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of one metric of one matrix, from the rows in memory."""
        wanted = [r for r in self.rows if (r.metric, r.kind, r.name) == (metric, kind, name)]
        return [r.step for r in wanted], [r.value for r in wanted]


def as_json(row: Row) -> dict[str, Any]:
    """Return the row as a JSON object; a value that is not finite becomes null."""
    return {**row._asdict(), "value": row.value if math.isfinite(row.value) else None}


def write_csv(rows: Iterable[Row], path: str | Path) -> None:
    """Write the rows as CSV, with the header step,kind,name,metric,value."""
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows])


def write_json(rows: Iterable[Row], path: str | Path) -> None:
    """Write the rows as a JSON list of objects."""
    Path(path).write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n")


def plot(rows: Iterable[Row], folder: str | Path, alarms: Iterable[Row] = ()) -> list[Path]:
    """Write one PNG per kind and metric, and return their paths; needs matplotlib.

    Each has a line per matrix; alarms are vertical red lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        lines.setdefault((row.kind, row.metric), {}).setdefault(row.name, []).append(row)
    alarms, files = list(alarms), []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for (kind, metric), by_name in lines.items():
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.add_subplot()
        for i, (name, points) in enumerate(by_name.items()):
            x, y = [r.step for r in points], [r.value for r in points]
            axis.plot(x, y, label=name, linewidth=1.2, linestyle=("-", "--", ":")[i // 10 % 3])
        for alarm in alarms:
            axis.axvline(alarm.step, color="red", alpha=0.4, linewidth=1)
        values = [r.value for points in by_name.values() for r in points if r.value > 0]
        if values and max(values) > 100 * min(values) and metric not in BOUNDED:
            axis.set_yscale("log")
        axis.set(xlabel="step", ylabel=metric, title=f"{metric} of {kind}")
        axis.grid(alpha=0.3)
        if len(by_name) > 1:
            axis.legend(fontsize=6, ncols=1 + len(by_name) // 25, loc="center left",
                        bbox_to_anchor=(1.0, 0.5))  # fmt: skip
        path = Path(folder) / f"{kind}_{metric}.png"
        figure.savefig(path, dpi=110)
        files.append(path)
    return files


BOUNDED = ("sign_diversity", "mean_alignment", "spectral_concentration")  # in [0, 1]: linear axes
