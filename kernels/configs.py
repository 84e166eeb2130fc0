"""Launch configurations: frozen records from `configs/<op>.json`, picked by data at each launch.

A file maps an architecture ("80", "90", "100", "120", "gfx942"; "cpu" is the interpreter; a name
stands for another's row) and a dtype to a list of records, large tiles first. `pick` takes the one
that keeps the busiest multiprocessor for the shortest time; an architecture without an entry uses
the nearest older one, a dtype without one is left to torch. So are matrices whose
shorter side is `torch_from` or more, where torch's products are the better choice: float32 without
tensor cores, which Triton multiplies less well than cuBLAS (an estimate; half the work makes up for
that in symmetric products). All records of a dtype share `block_k`, so the choice of tiles changes
no sum's order and results do not depend on company. None of the records has been measured on a GPU.

By arithmetic of tiles per multiprocessor (H100, float16; 2026-11) this halves the time of a last
wave: a symmetric product of 2048 x 2048 has 136 tiles of 128 for 132 multiprocessors, so two for
the busiest one, 17.9 us; its 528 of 64 take 9.0. Sums split along K would leave less to gain than
they cost: their parts are float32, written and read again, and a launch more adds them in order, 2
us and the traffic for 2.2 us of 1024 x 1024 or 6.7 of 12 x 768 x 768. `gram.pieces` splits where K
is long.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


SMALLER = 0.8  # an estimate: a tile of 64 x 64 loads twice what one of 128 x 128 does per product
FUSION = {"enable_fp_fusion": True}  # Triton's default changes in 3.10


class Row(NamedTuple):
    """A table's entry for an architecture."""

    records: dict[str, tuple[Config, ...]]
    torch_from: dict[str, int]


@lru_cache
def load(op: str) -> dict[str, Row]:
    """The table of an op: architecture, dtype, records."""
    stored = json.loads((FOLDER / f"{op}.json").read_text())
    table = {}
    for arch, row in stored.items():
        row = dict(stored[row] if isinstance(row, str) else row)
        limits = row.pop("torch_from", {})
        table[arch] = Row({d: tuple(Config(**r) for r in some) for d, some in row.items()}, limits)
    return table


@lru_cache
def device_of(device: torch.device) -> tuple[str, int]:
    """Architecture and number of multiprocessors."""
    if device.type == "cpu":
        return "cpu", 2
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.major}{properties.minor}", properties.multi_processor_count


def lanes(arch: str) -> int:
    """Threads of a warp."""
    return 64 if arch.startswith("gfx") else 32


def precision(dtype: torch.dtype) -> str:
    """How products of this dtype multiply: float32 as torch does, which is to say by tensor cores
    only where `torch.backends.cuda.matmul.fp32_precision` says so, which
    `torch.set_float32_matmul_precision` sets."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def label(dtype: torch.dtype) -> str:
    """A dtype's name in the tables."""
    return "tf32" if precision(dtype) == "tf32" else str(dtype).removeprefix("torch.")


def row(op: str, arch: str) -> Row:
    """What a table has for an architecture, its own or the nearest older one's; or nothing."""
    rows = load(op)
    if arch in rows:
        return rows[arch]
    known = [a for a in rows if a.isdigit() and arch.isdigit() and int(a) <= int(arch)]
    return rows[max(known, key=int)] if known else Row({}, {})


def records(op: str, dtype: torch.dtype, arch: str, side: int = 0) -> tuple[Config, ...]:
    """The records for a dtype on an architecture, () where the op is left to torch: `side` is the
    least of the sides of its products."""
    name, (known, torch_from) = label(dtype), row(op, arch)
    return known.get(name, ()) if side < torch_from.get(name, math.inf) else ()


def pick(choices: Sequence[Config], device: torch.device, tiles: Callable[[Config], int]) -> Config:
    """The record with the least work for the busiest multiprocessor, in elements of tiles: a
    smaller tile, which loads more for each, only if that is below 4/5 of a larger one's."""
    _, processors = device_of(device)

    def busiest(c: Config) -> int:
        return math.ceil(tiles(c) / processors) * c.block_m * c.block_n

    best = choices[0]
    for smaller in choices[1:]:
        if busiest(smaller) < SMALLER * busiest(best):
            best = smaller
    return best


def programs(device: torch.device, tiles: int) -> int:
    """Programs of a persistent launch."""
    return min(tiles, 2 * device_of(device)[1])
