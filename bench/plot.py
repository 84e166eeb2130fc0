"""Bars of what a benchmark measured: `python -m orthonorm.bench.plot FILE.json ...` writes FILE.png."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def bars(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Medians with their 10th to 90th percentile, in groups of op, shape and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["median_ms"] is not None]
    names = list(dict.fromkeys(row["backend"] for row in timed))
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.3 * len(timed)), layout="constrained")
    for at, row in enumerate(reversed(timed)):
        spread = [
            [row["median_ms"] - row["p10_ms"]],
            [row["p90_ms"] - row["median_ms"]],
        ]
        color = f"C{names.index(row['backend']) % 10}"
        axis.barh(at, row["median_ms"], xerr=spread, color=color)
    axis.set_yticks(
        range(len(timed)),
        [" ".join((r["name"], r["shape"], r["dtype"], r["backend"])) for r in reversed(timed)],
        fontsize=7,
    )
    axis.set_xscale("log")
    axis.set_xlabel("ms, median and 10th to 90th percentile")
    axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plot", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args(arguments).files:
        data = json.loads(path.read_text())
        environment = data["environment"]
        title = f"{path.stem}: {environment['device']}, torch {environment['torch']}"
        bars(data["rows"], path.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
