"""The output folder of a comparison: its files, and how it is created, continued and replaced."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from orthonorm.examples.config import PRESETS, Config, UsageError, make_config
from orthonorm.examples.data import load_corpus
from orthonorm.examples.optimizers import Settings
from orthonorm.examples.progress import write_whole
from orthonorm.examples.ranks import check_ranks, leads
from orthonorm.examples.report import Finished
from orthonorm.examples.training import Run

RUN_FILES = ("result.json", "run.json", "log.csv", "checkpoint.pt")


class RunFailed(Exception):
    """A training process ended with an exit code other than 0; it has printed the reason."""


@dataclass(frozen=True)
class Workspace:
    """An output folder with tokens.pt, and the configuration that all its runs share."""

    out: Path
    preset: str
    config: Config
    names: list[str]
    source: str

    @staticmethod
    def create(out: Path, preset: str, given: dict[str, Any], names: Sequence[str]) -> Workspace:
        """Check the request; write tokens.pt, then config.json, which marks the start."""
        config = make_config(preset, given)
        check_ranks(config)
        check_device(config.device)
        # The number of threads changes the order of sums, so it is part of the run.
        config = dataclasses.replace(config, threads=config.threads or torch.get_num_threads())
        corpus = load_corpus(config)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out must be a folder, got {out}: {error}") from None
        (out / "config.json").unlink(missing_ok=True)
        for started in list(out.glob("*/run.json")):
            for name in RUN_FILES:
                started.with_name(name).unlink(missing_ok=True)
        tokens = {"train": corpus.train, "val": corpus.val}
        write_whole(out / "tokens.pt", lambda path: torch.save(tokens, path))
        new = Workspace(out, preset, config, list(names), corpus.source)
        values = {**dataclasses.asdict(new), "out": str(out)}
        text = json.dumps(values, indent=2) + "\n"
        write_whole(out / "config.json", lambda path: path.write_text(text))
        return new

    @staticmethod
    def reopen(
        out: Path, preset: str | None, given: dict[str, Any], names: Sequence[str] | None
    ) -> Workspace:
        """Reopen the folder `out`; raise UsageError if an option differs from the stored one."""
        stored = json.loads((out / "config.json").read_text())
        config = Config(**stored["config"])
        wanted = {**PRESETS[preset], **given} if preset else given
        for name, value in wanted.items():
            if getattr(config, name) != value:
                raise UsageError(
                    f"--resume continues {out} as it was started, with {name} "
                    f"{getattr(config, name)!r}, got {value!r}"
                )
        check_ranks(config)
        chosen = list(names or stored["names"])
        return Workspace(out, stored["preset"], config, chosen, stored["source"])

    def run(self, label: str, optimizer: str, settings: Settings, stop_after: int | None) -> bool:
        """Train in a new process, in the folder `label`; return True if the run is complete.

        Continue from a checkpoint if there is one; do nothing if the run is complete already.
        """
        folder, run = self.out / label, Run(self.config, optimizer, settings)
        description = folder / "run.json"
        if description.exists() and Run.read(description) != run:
            raise UsageError(
                f"--resume continues {folder} with the settings of its run.json, "
                f"{Run.read(description).settings}, got {settings}"
            )
        if not (folder / "result.json").exists():
            if leads():
                folder.mkdir(exist_ok=True)
                write_whole(description, lambda path: path.write_text(run.text()))
            command = [sys.executable, "-m", "orthonorm.examples.training", str(folder)]
            command += [] if stop_after is None else ["--stop-after", str(stop_after)]
            code = subprocess.run(command).returncode
            if code == 130:
                raise KeyboardInterrupt
            if code:
                raise RunFailed(f"{label} ended with exit code {code}")
        return (folder / "result.json").exists()

    def settings_of(self, label: str) -> Settings | None:
        """Return the settings of the run that was started in the folder `label`, or None."""
        path = self.out / label / "run.json"
        return Run.read(path).settings if path.exists() else None

    def finished(self, label: str) -> Finished:
        """Return the complete run in the folder `label`."""
        return Finished.read(self.out / label)


def check_device(device: str) -> None:
    """Raise UsageError unless torch can make a tensor on the device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        rule = "--device must be one that torch can use here"
        raise UsageError(f"{rule}, got {device}: {why}") from None
