"""The cost of one Muon step on 1 to 4096 devices: measured kernel rates, modelled communication.

Compares two plans for parameters sharded over P devices:

owner    Every matrix belongs to one device (longest first, to the least loaded). It receives the
         (P - 1) / P of its matrices that others hold and sends as much back: two all-to-alls of
         2 bytes per element. Work shrinks until every device has one matrix, or none.
gram     Every device keeps its part of every matrix: partial products X X^T, one ring all-reduce
         of 2 (P - 1) / P n^2 float32 numbers per matrix, then the n x n iteration on every device.

Nothing is overlapped; a collective costs log2(P) messages of the given latency. Passes over the
parameters (14 bytes per element: gradient, momentum, update, weights) run at copy bandwidth.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import ceilings, records, report, shapes
from .measure import Request, measure
from .timing import Plan

STEPS = 5  # steps of the quintic
HALF, SINGLE, PASSES = 2.0, 4.0, 14.0  # bytes per element
DEVICES = tuple(2**i for i in range(13))
LARGEST = 2e11  # most FLOPs of a probe; larger matrices get the rate of a scaled-down one


class Matrix(NamedTuple):
    """One matrix of the model: short and long side."""

    n: int
    m: int

    @property
    def flops(self) -> float:
        """Nominal operations of the direct form, which measured rates count too."""
        return STEPS * (4.0 * self.n**2 * self.m + 2.0 * self.n**3)


class Machine(NamedTuple):
    """Rates of one device.

    Kernel rates by matrix (nominal FLOP/s), product (FLOP/s) and copy (bytes per second) for the
    modelled work, link bytes per second in each direction, and seconds per message.
    """

    rates: Mapping[Matrix, float]
    product: float
    copy: float
    link: float
    latency: float


class Cost(NamedTuple):
    """Seconds of one step by part."""

    compute: float
    passes: float
    communication: float

    @property
    def total(self) -> float:
        return sum(self)


def matrices(workload: shapes.Workload) -> list[Matrix]:
    """Return every matrix of a workload, members of batches one by one."""
    found = []
    for shape in workload.shapes:
        n, m = sorted(shape[-2:])
        found += [Matrix(n, m)] * math.prod(shape[:-2])
    return found


def _messages(devices: int, count: int, machine: Machine) -> float:
    """Return the latency of `count` collectives in seconds."""
    return count * math.ceil(math.log2(devices)) * machine.latency if devices > 1 else 0.0


def owner(owned: Sequence[Matrix], devices: int, machine: Machine) -> Cost:
    """Return the cost of the plan "owner"; the device with the most work decides."""
    seconds = sorted(((x.flops / machine.rates[x], x) for x in owned), reverse=True)
    loads = [(0.0, 0.0)] * devices  # (seconds, elements)
    for took, x in seconds:
        busy, elements = heapq.heappop(loads)
        heapq.heappush(loads, (busy + took, elements + x.n * x.m))
    compute = max(busy for busy, _ in loads)
    moved = max(elements for _, elements in loads) * (devices - 1) / devices
    groups = len({x.n for x in owned})
    total = sum(x.n * x.m for x in owned)
    return Cost(
        compute,
        PASSES * total / devices / machine.copy,
        2 * HALF * moved / machine.link + _messages(devices, 2 * groups, machine),
    )


def gram(owned: Sequence[Matrix], devices: int, machine: Machine) -> Cost:
    """Return the cost of the plan "gram".

    The two products with X are divided among devices, the iteration is repeated on each. Full
    products without restart take (4 m n^2) / P + 2 (4 T - 3) n^3 FLOPs.
    """
    shared = sum(4.0 * x.n**2 * x.m for x in owned) / devices
    repeated = sum(2.0 * (4 * STEPS - 3) * x.n**3 for x in owned)
    reduced = sum(x.n**2 for x in owned) * 2.0 * (devices - 1) / devices
    groups = len({x.n for x in owned})
    total = sum(x.n * x.m for x in owned)
    return Cost(
        (shared + repeated) / machine.product,
        PASSES * total / devices / machine.copy,
        SINGLE * reduced / machine.link + _messages(devices, 2 * groups, machine),
    )


def probe(x: Matrix) -> Matrix:
    """Return a matrix of the same aspect ratio that can be measured in about a second."""
    shrink = min(1.0, (LARGEST / x.flops) ** (1 / 3))
    return Matrix(max(1, int(x.n * shrink)), max(1, int(x.m * shrink)))


def measured(owned: Sequence[Matrix], device: str, seconds: float) -> dict[Matrix, float]:
    """Measure our nominal FLOP/s on every distinct matrix."""
    found: dict[Matrix, float] = {}
    for x in Counter(owned):
        n, m = probe(x)
        request = Request("newton_schulz", shapes.parse(f"{n}x{m}"), device=device, kinds=(),
                          refcheck=False, plan=Plan(seconds=seconds))  # fmt: skip
        (row,) = measure(request)
        if row.rate is None:
            raise RuntimeError(f"bench: newton_schulz on {n}x{m} failed: {row.note}")
        found[x] = row.rate
        print(f"  {x.n}x{x.m}: {report.scaled(row.rate, 'FLOP/s')} measured on {n}x{m}", flush=True)
    return found


def crossing(costs: Sequence[tuple[int, Cost]]) -> int | None:
    """Return the least number of devices whose communication takes longer than the rest."""
    return next((p for p, c in costs if c.communication > c.compute + c.passes), None)


def table(owned: Sequence[Matrix], machine: Machine) -> list[str]:
    """Return a line per number of devices, and lines on where communication dominates."""
    rows = [("devices", "compute", "passes", "all-to-all", "step ms", "speedup", "busy",
             "gram all-reduce ms")]  # fmt: skip
    costs = [(p, owner(owned, p, machine)) for p in DEVICES]
    alone = costs[0][1].total
    for p, c in costs:
        parts = (report.milliseconds(1e3 * part) for part in (*c, c.total))
        other = gram(owned, p, machine)
        rows.append((str(p), *parts, f"{alone / c.total:.1f}x", f"{alone / c.total / p:.0%}",
                     report.milliseconds(1e3 * other.total)))  # fmt: skip
    at, grams = crossing(costs), [(p, gram(owned, p, machine)) for p in DEVICES]
    where = f"from {at} devices on" if at else f"nowhere up to {DEVICES[-1]} devices"
    wins = [p for (p, c), (_, g) in zip(costs, grams, strict=True) if g.total < c.total]
    best = f"on {', '.join(map(str, wins))} devices" if wins else "nowhere"
    return [
        *report.align(rows, left=0),
        f"communication takes longer than everything else {where}",
        f"the Gram all-reduce is the faster plan {best}",
        f"no step is shorter than its largest matrix: "
        f"{report.milliseconds(1e3 * max(x.flops / machine.rates[x] for x in owned))} ms",
    ]


def main(options: argparse.Namespace, run: records.Run) -> None:
    """Print the model for each --shape (by default llama-130m)."""
    given = options.tflops and options.copy
    limits = run.ceilings or ({} if given else ceilings.measured(options.device))
    for name in options.shape or ["llama-130m"]:
        workload = shapes.parse(name)
        owned = matrices(workload)
        print(f"{name}: {len(owned)} matrices, {workload.numel / 1e6:.0f} M elements")
        if options.tflops:
            rates = dict.fromkeys(owned, options.tflops * 1e12)
            product = options.tflops * 1e12
        else:
            rates = measured(owned, options.device, options.seconds or 1.0)
            product = limits["float32"]
        copy = options.copy * 1e9 if options.copy else limits[ceilings.COPY]
        machine = Machine(rates, product, copy, options.gbps * 1e9, options.latency * 1e-6)
        print(f"links {options.gbps:g} GB/s each way, {options.latency:g} us a message")
        print("\n".join("  " + line for line in table(owned, machine)), end="\n\n")
