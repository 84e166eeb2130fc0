"""The table and the curves of a comparison, from the log.csv and result.json of each run."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINES = ("adamw", "torch-adamw")  # the first of these in a comparison is its baseline
EXPLANATION = """\
val loss: nats per token at the last step, the same windows for all. Steps and time to {baseline}'s
loss: when the validation loss first falls to {baseline}'s last one, linear between evaluations;
time without evaluations. In optimizer: share of the training time spent in optimizer.step().
Peak memory: {memory}. State: tensors in the
optimizer's state_dict."""


@dataclass(frozen=True)
class Finished:
    """A finished run: the rows of its log (column name to number) and its result."""

    name: str
    rows: list[dict[str, float]]
    result: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> Finished:
        """Read a run from the folder in which training.py wrote its files."""
        with (folder / "log.csv").open(newline="") as file:
            rows = [{key: float(row[key]) for key in row} for row in csv.DictReader(file)]
        return Finished(folder.name, rows, json.loads((folder / "result.json").read_text()))

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Return (step, seconds) at which the validation loss first falls to `loss`, or None.

        Interpolates linearly between evaluations.
        """
        before = None
        for row in self.rows:
            if row["val_loss"] <= loss:
                if before is None:
                    return row["step"], row["seconds"]
                part = (before["val_loss"] - loss) / (before["val_loss"] - row["val_loss"])
                step, seconds = (
                    before[key] + part * (row[key] - before[key]) for key in ("step", "seconds")
                )
                return step, seconds
            before = row
        return None


def table(runs: Sequence[Finished], device: str) -> str:
    """Return a Markdown table of the runs, with a paragraph that explains the columns."""
    finals = {run.name: run.result["val_loss"] for run in runs if not run.result["diverged"]}
    baseline = next((name for name in BASELINES if name in finals), None)
    chased = baseline or "AdamW"
    lines = [
        [
            "optimizer", "lr", "val loss", f"steps to {chased}'s loss", "time to it", "total time",
            "in optimizer", "peak memory", "state",
        ]
    ]  # fmt: skip
    for run in runs:
        result = run.result
        reached = run.reaches(finals[baseline]) if baseline else None
        missing = "not reached" if baseline else "-"
        diverged = f"diverged at step {result['steps']}"
        lines.append(
            [
                run.name,
                f"{result['settings']['lr']:g}",
                diverged if result["diverged"] else f"{result['val_loss']:.4f}",
                f"{reached[0]:.0f}" if reached else missing,
                f"{reached[1]:.1f} s" if reached else missing,
                f"{result['seconds']:.1f} s",
                f"{result['optimizer_seconds'] / max(result['seconds'], 1e-9):.1%}",
                f"{result['peak_bytes'] / 1e6:.0f} MB" if result["peak_bytes"] else "not measured",
                f"{result['state_bytes'] / 1e6:.1f} MB",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.ljust(widths[i]) for i, cell in enumerate(line)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    process = "of the run's own process, Python and torch included"
    memory = "of torch's CUDA allocator" if device.startswith("cuda") else process
    text = "\n".join("| " + " | ".join(line) + " |" for line in padded)
    return f"{text}\n\n{EXPLANATION.format(baseline=chased, memory=memory)}\n"


def plot(runs: Sequence[Finished], path: Path, title: str) -> str | None:
    """Write the loss curves as a PNG; return None, or a sentence that says why there are none."""
    try:
        import matplotlib
    except ImportError:
        return "No curves: they need matplotlib (pip install matplotlib)."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, column in zip(axes, ("step", "seconds"), strict=True):
        for index, run in enumerate(runs):
            rows, color = run.rows, f"C{index}"
            x = [row[column] for row in rows]
            axis.plot(x, [row["val_loss"] for row in rows], color=color, label=run.name)
            axis.plot(x, [row["train_loss"] for row in rows], color=color, alpha=0.3, linewidth=1)
        axis.set_xlabel("training seconds" if column == "seconds" else "step")
        axis.grid(alpha=0.3)
    ends = [row["val_loss"] for run in runs for row in run.rows[1:]]
    finite = [loss for loss in ends if loss == loss and loss != float("inf")]
    if finite:
        axes[0].set_ylim(min(finite) * 0.95, max(finite) * 1.05)
    axes[0].set_ylabel("loss, nats per token (pale: training)")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return None
