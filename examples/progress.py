"""What a long run shows while it runs, and files that are either whole or absent."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Progress:
    """A tqdm bar on a terminal; plain lines through `say` there and everywhere else."""

    def __init__(self, label: str, total: int, done: int, shown: bool = True) -> None:
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return  # the bar is a comfort: `say` still reports every evaluation
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit="step", leave=False)

    def step(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Prints one line on stdout, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a file beside `path` and renames it: a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
