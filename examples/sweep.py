"""Search of learning rates on a small grid per optimizer, and the settings file with the result."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from orthonorm.examples.config import Config
from orthonorm.examples.optimizers import Settings
from orthonorm.examples.progress import write_whole

GRIDS: dict[str, tuple[float, ...]] = {
    "adamw": (0.001, 0.002, 0.004, 0.008),
    "muon": (0.01, 0.02, 0.04),
    "conda": (0.005, 0.01, 0.02),
}
EXTENSIONS = 3  # most factors of two added to the grid while the best value is at its end

Measure = Callable[[str, Settings], float | None]  # final validation loss; None: diverged


def sweep(
    names: Iterable[str], defaults: Callable[[str], Settings], measure: Measure
) -> tuple[dict[str, Settings], dict[str, list[dict[str, float | None]]]]:
    """Return (best settings, all losses) by rule; Muon's AdamW takes the best rate of AdamW."""
    best: dict[str, Settings] = {}
    losses: dict[str, list[dict[str, float | None]]] = {}
    for name in sorted(names, key=lambda name: list(GRIDS).index(name.removeprefix("torch-"))):
        rule = name.removeprefix("torch-")
        settings = defaults(name)
        if "adamw_lr" in settings and "adamw" in best:
            settings["adamw_lr"] = best["adamw"]["lr"]
        seen: dict[float, float | None] = {}
        todo = list(GRIDS[rule])
        while todo:
            for lr in todo:
                seen[lr] = measure(name, {**settings, "lr": lr})
            winner = min(seen, key=lambda lr: math.inf if seen[lr] is None else seen[lr] or 0.0)
            todo = []
            if len(seen) < len(GRIDS[rule]) + EXTENSIONS:
                todo += [winner / 2] if winner == min(seen) else []
                todo += [winner * 2] if winner == max(seen) else []
        best[rule] = {**settings, "lr": winner}
        losses[rule] = [{"lr": lr, "val_loss": seen[lr]} for lr in sorted(seen)]
    return best, losses


def write_settings(
    path: Path, config: Config, command: str, names: list[str], source: str,
    best: dict[str, Settings], losses: dict[str, list[dict[str, float | None]]],
) -> None:  # fmt: skip
    """Write the settings and how they were found; settings of other rules in the file stay."""
    old = json.loads(path.read_text()) if path.exists() else {"settings": {}, "sweep": {}}
    how = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "optimizers": names,
        "text": source,
        "config": dataclasses.asdict(config),
        "grid": f"factors of two; at most {EXTENSIONS} more beyond an end that came out best",
        "muon.adamw_lr": "the best AdamW rate of the same sweep, where AdamW was in it",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "orthonorm": _version(),
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    text = to_text(
        {
            "how": how,
            "settings": {**old["settings"], **best},
            "sweep": {**old["sweep"], **losses},
        }
    )
    write_whole(path, lambda part: part.write_text(text))


def _version() -> str:
    try:
        return importlib.metadata.version("orthonorm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def to_text(value: dict[str, Any]) -> str:
    """Return JSON with two levels of indentation, so that each entry of a section is one line."""
    parts = []
    for key, inner in value.items():
        lines = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in inner.items()]
        parts.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"
