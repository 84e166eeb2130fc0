"""Progress of a long run on the terminal, and files that are never partly written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Progress:
    """A tqdm bar on terminals, and lines of text (`say`) everywhere."""

    def __init__(self, label: str, total: int, done: int, shown: bool = True) -> None:
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return  # the bar is optional: `say` still reports every evaluation
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit="step", leave=False)

    def step(self) -> None:
        """Count a step."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Print a line on stdout, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a file beside `path`, then rename it, so that no reader sees half a file."""
    part = path.with_name(path.name + ".part")
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
