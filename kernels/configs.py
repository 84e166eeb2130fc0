"""Launch configurations: frozen records from `configs/<op>.json`, picked by data at each launch.

A file maps an architecture and a dtype to a list of records, large tiles first. Architectures are
"80", "90", "100", "120", "gfx942", and "cpu" for the interpreter; a row that is a name refers to
that architecture's row. `pick` takes the record that keeps the busiest multiprocessor for the
shortest time. An architecture without a row uses the nearest older one. A dtype without records is
left to torch. So are matrices whose shorter side is `torch_from` or more, where torch's products
are the better choice. That is float32 without tensor cores, which Triton multiplies less well than
cuBLAS (an estimate; in symmetric products, half the work makes up for that). All records of a dtype
share `block_k`. So the choice of tiles changes no sum's order, and results do not depend on
company. None of the records has been measured on a GPU.

By arithmetic of tiles per multiprocessor (H100, float16; 2026-11) this choice halves the time of a
last wave. A symmetric product of 2048 x 2048 has 136 tiles of 128 for 132 multiprocessors, so two
for the busiest one: 17.9 us. Its 528 tiles of 64 take 9.0 us. Splitting sums along K would cost
more than it gains: their float32 parts are written and read again, and one more launch adds them in
order. That is 2 us and the traffic, to save 2.2 us of 1024 x 1024 or 6.7 us of 12 x 768 x 768.
`gram.pieces` splits where K is long.
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
        """Keyword arguments of Triton's launcher."""
        return dict(num_warps=self.warps, num_stages=self.stages, **FUSION)

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


SMALLER = 0.8  # an estimate: tiles of 64 x 64 load twice as much per product as tiles of 128 x 128
FUSION = {"enable_fp_fusion": True}  # Triton's default changes in 3.10


class Row(NamedTuple):
    """Records and `torch_from` of one architecture, by name of dtype (`label`)."""

    records: dict[str, tuple[Config, ...]]
    torch_from: dict[str, int]


@lru_cache
def load(op: str) -> dict[str, Row]:
    """Return the table of an op by architecture."""
    stored = json.loads((FOLDER / f"{op}.json").read_text())
    table = {}
    for arch, row in stored.items():
        row = dict(stored[row] if isinstance(row, str) else row)
        limits = row.pop("torch_from", {})
        table[arch] = Row({d: tuple(Config(**r) for r in some) for d, some in row.items()}, limits)
    return table


@lru_cache
def device_of(device: torch.device) -> tuple[str, int]:
    """Return the architecture, and the number of multiprocessors (2 for a CPU)."""
    if device.type == "cpu":
        return "cpu", 2
    properties = torch.cuda.get_device_properties(device)
    arch = f"{properties.major}{properties.minor}"
    if torch.version.hip:  # gfx942 would be "94", newer than a Hopper
        arch = properties.gcnArchName.partition(":")[0]
    return arch, properties.multi_processor_count


def lanes(arch: str) -> int:
    """Return the number of threads of a warp."""
    return 64 if arch.startswith("gfx") else 32


def precision(dtype: torch.dtype) -> str:
    """Return how products of this dtype multiply: "tf32" or "ieee".

    float32 follows torch: it uses tensor cores only if `torch.backends.cuda.matmul.fp32_precision`
    is "tf32", which `torch.set_float32_matmul_precision` sets.
    """
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def label(dtype: torch.dtype) -> str:
    """Return a dtype's name in the tables."""
    return "tf32" if precision(dtype) == "tf32" else str(dtype).removeprefix("torch.")


def row(op: str, arch: str) -> Row:
    """Return the row of an architecture, or of the nearest older one, or else an empty row."""
    rows = load(op)
    if arch in rows:
        return rows[arch]
    known = [a for a in rows if a.isdigit() and arch.isdigit() and int(a) <= int(arch)]
    return rows[max(known, key=int)] if known else Row({}, {})


def records(op: str, dtype: torch.dtype, arch: str, side: int = 0) -> tuple[Config, ...]:
    """Return the records of a dtype on an architecture; () if torch is to compute the op.

    `side` is the shorter side of its matrices.
    """
    name, (known, torch_from) = label(dtype), row(op, arch)
    return known.get(name, ()) if side < torch_from.get(name, math.inf) else ()


def pick(choices: Sequence[Config], device: torch.device, tiles: Callable[[Config], int]) -> Config:
    """Return the record with the least work for the busiest multiprocessor, in elements of tiles.

    A smaller tile loads more per element. So it is taken only if its work is below 4/5 of that of
    the best larger tile.
    """
    _, processors = device_of(device)

    def busiest(c: Config) -> int:
        return math.ceil(tiles(c) / processors) * c.block_m * c.block_n

    best = choices[0]
    for smaller in choices[1:]:
        if busiest(smaller) < SMALLER * busiest(best):
            best = smaller
    return best


def programs(device: torch.device, tiles: int) -> int:
    """Return the number of programs of a persistent launch, two per multiprocessor at most."""
    return min(tiles, 2 * device_of(device)[1])
