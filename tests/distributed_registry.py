"""Cases that every rank of tests/test_distributed.py runs, by name, and in which worlds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Context(NamedTuple):
    rank: int
    world: int
    folder: Path


Case = Callable[[Context], None]
CASES: dict[str, Case] = {}
WORLDS: dict[str, tuple[int, ...]] = {}


def case(*worlds: int, name: str = "") -> Callable[[Case], Case]:
    def add(f: Case) -> Case:
        label = name or f.__name__
        CASES[label], WORLDS[label] = f, worlds
        return f

    return add


def raises(f: Callable[[], Any], *words: str) -> None:
    try:
        f()
    except (ValueError, RuntimeError) as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, (missing, str(error))
    else:
        raise AssertionError(f"no error with {words}")
