"""Cases that every rank of tests/test_distributed.py runs, by name, and in which worlds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

device_mesh = functools.cache(init_device_mesh)  # a new one makes process groups: 10 ms and more


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


def put(t: Tensor, mesh: Any, places: list[Any]) -> DTensor:
    """A tensor that every rank has as one that they share: each keeps its part, none is sent."""
    return distribute_tensor(t, mesh, places, src_data_rank=None)


def part(t: Tensor, like: Tensor) -> Tensor:
    """What this rank has of a whole tensor that is placed as `like`."""
    return put(t, like.device_mesh, like.placements).to_local() if is_shared(like) else t


def is_shared(t: Any) -> bool:
    return isinstance(t, DTensor)


def local(t: Any) -> Any:
    return t.to_local() if is_shared(t) else t


def whole(t: Any) -> Any:
    return t.full_tensor() if is_shared(t) else t
