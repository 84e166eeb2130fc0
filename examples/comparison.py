"""The table and the curves of `compare_optimizers`, made from its JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from orthonorm.examples.report import Finished

BASELINE = "AdamW"
DASHES = ("-", "--", ":", "-.")


def mean_run(result: dict[str, Any]) -> Finished | None:
    """Return the mean of an optimizer's curves over the seeds; None if a seed diverged."""
    if any(run["diverged"] for run in result["runs"]):
        return None
    rows = [
        {key: fmean(point[k] for point in points)
         for k, key in enumerate(("step", "seconds", "val_loss"))}
        for points in zip(*(run["curve"] for run in result["runs"]), strict=True)
    ]  # fmt: skip
    return Finished(result["optimizer"], rows, {})


def ranked(found: dict[str, Any]) -> list[tuple[dict[str, Any], Finished | None]]:
    """Return (result, mean run) of every optimizer, the lowest loss first, diverged ones last."""
    pairs = [(result, mean_run(result)) for result in found["optimizers"]]
    return sorted(pairs, key=lambda pair: pair[1].rows[-1]["val_loss"] if pair[1] else 1e300)


def spread(result: dict[str, Any]) -> float:
    """Return half the difference between the losses of the worst and the best seed."""
    losses = [run["val_loss"] for run in result["runs"]]
    return (max(losses) - min(losses)) / 2


def table(found: dict[str, Any], only: Sequence[str] = ()) -> str:
    """Return a Markdown table: loss and spread, rate, steps to AdamW's loss, time, state.

    Of the optimizers named in `only`, if any.
    """
    about, pairs = found["how"], ranked(found)
    chased = next((run for result, run in pairs if run and run.name == BASELINE), None)
    lines = [
        f"| optimizer | val loss, {len(about['seeds'])} seeds | lr | steps to {BASELINE}'s loss "
        "| ms a step, optimizer | state, bytes a parameter |",
        "|---|---|---|---|---|---|",
    ]
    steps = about["config"]["steps"]
    for result, run in pairs:
        if only and result["optimizer"] not in only:
            continue
        runs = result["runs"]
        reached = run.reaches(chased.rows[-1]["val_loss"]) if run and chased else None
        milliseconds = 1e3 * fmean(r["optimizer_seconds"] for r in runs) / steps
        cells = (
            f"`{result['optimizer']}`",
            f"{run.rows[-1]['val_loss']:.3f} ± {spread(result):.3f}" if run else "diverged",
            f"{result['settings']['lr']:.2g}",
            f"{reached[0]:.0f}" if reached else "not reached" if chased else "-",
            f"{milliseconds:.1f}",
            f"{runs[0]['state_bytes'] / about['parameters']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + explanation(about)


def explanation(about: dict[str, Any]) -> str:
    """Return the paragraph under the table: model, machine, settings, meaning of the columns."""
    c = about["config"]
    return (
        "A short run of a small model: it tells that an optimizer learns and what it costs, not "
        "which one is best. "
        f"{about['parameters'] / 1e6:.2f} M parameters ({c['layers']} layers of {c['hidden']}), "
        f"{c['steps']} steps of {c['batch']} x {c['context']} bytes of {about['text']}; "
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['date']}. "
        f"The matrices' learning rate: {about['rates']}; all else by default but "
        "AdamW's betas (0.9, 0.95) and decay 0.1, Conda's betas (0.9, 0.99) and gap of 50 and "
        "Scion's momentum 0.1; embeddings, head and gains by that AdamW, at its rate, in all. "
        "Val loss: nats per byte, mean and half the range of "
        "the seeds."
    )


def plot(found: dict[str, Any], path: Path) -> str | None:
    """Write the mean curves with the range of the seeds as a PNG.

    Return None, or a sentence that says why there are no curves.
    """
    try:
        import matplotlib
    except ImportError:
        return "No curves: they need matplotlib (pip install matplotlib)."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = [(result, run) for result, run in ranked(found) if run]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.5), sharey=True, layout="constrained")
    for i, (result, run) in enumerate(pairs):
        losses = [[point[2] for point in r["curve"]] for r in result["runs"]]
        low, high = ([f(column) for column in zip(*losses, strict=True)] for f in (min, max))
        color, dash = f"C{i % 10}", DASHES[i // 10 % len(DASHES)]
        for axis, key in zip(axes, ("step", "seconds"), strict=True):
            x = [row[key] for row in run.rows]
            axis.plot(x, [row["val_loss"] for row in run.rows], dash, color=color, linewidth=1.3,
                      label=f"{run.name} {run.rows[-1]['val_loss']:.3f}")  # fmt: skip
            axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    axes[0].set(xlabel="step", ylabel="validation loss, nats per byte")
    axes[1].set(xlabel="training seconds")
    if pairs:
        _limits(axes[0], [run for _, run in pairs])
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


def _limits(axis: Any, runs: Sequence[Finished]) -> None:
    """Limit the axis from the lowest loss to the largest at the third evaluation.

    The first values are so large that they would hide the rest.
    """
    ends = [run.rows[-1]["val_loss"] for run in runs]
    starts = [row["val_loss"] for run in runs for row in run.rows[2:3]]
    axis.set_ylim(min(ends) * 0.98, max([*ends, *starts]) * 1.02)
