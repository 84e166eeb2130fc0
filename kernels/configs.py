"""Launch configurations: frozen records from `configs/<op>.json`, picked by data at each launch.

A file maps an architecture ("80", "90", "100"; "cpu" is the interpreter) and a dtype to a list of
records, large tiles first. `pick` takes the first whose tiles fill the device, the last if none
does; an architecture without an entry uses the nearest older one, a dtype without one is left to
torch. All records of a dtype share `block_k`, so the choice of tiles changes no sum's order and
results do not depend on company. None of the shipped records has been measured on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """As Triton's launcher takes them."""
        return dict(num_warps=self.warps, num_stages=self.stages, **FUSION)

    @property
    def blocks(self) -> dict[str, int]:
        return {k.upper(): v for k, v in asdict(self).items() if k.startswith("block")}


FUSION = {"enable_fp_fusion": True}  # Triton's default changes in 3.10


@lru_cache
def load(op: str) -> dict[str, dict[str, tuple[Config, ...]]]:
    """The table of an op: architecture, dtype, records."""
    stored = json.loads((FOLDER / f"{op}.json").read_text())
    return {
        arch: {dtype: tuple(Config(**r) for r in records) for dtype, records in rows.items()}
        for arch, rows in stored.items()
    }


@lru_cache
def device_of(device: torch.device) -> tuple[str, int]:
    """Architecture and number of multiprocessors."""
    if device.type == "cpu":
        return "cpu", 2
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.major}{properties.minor}", properties.multi_processor_count


def records(op: str, dtype: torch.dtype, arch: str) -> tuple[Config, ...]:
    """The records for a dtype on an architecture, () where the op is left to torch."""
    rows = load(op)
    known = [a for a in rows if a != "cpu" and arch != "cpu" and int(a) <= int(arch)]
    row = rows["cpu"] if arch == "cpu" else rows[max(known, key=int)] if known else {}
    return row.get(str(dtype).removeprefix("torch."), ())


def pick(choices: Sequence[Config], device: torch.device, tiles: Callable[[Config], int]) -> Config:
    """The first record whose `tiles(record)` fill the device, or the one with the most of them."""
    _, processors = device_of(device)
    filling = (c for c in choices if tiles(c) >= processors)
    return next(filling, max(choices, key=tiles))


def programs(device: torch.device, tiles: int) -> int:
    """Programs of a persistent launch."""
    return min(tiles, 2 * device_of(device)[1])
