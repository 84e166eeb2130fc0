"""Compare Muon's step on several ranks: divided among them, and repeated on each of them.

    python -m orthonorm.bench.ranks --ranks 1 2 4 --json bench/results/NAME.json

Starts gloo ranks of one thread each. "sharded": each rank has rows of every matrix (as FSDP2 places
them), and each direction is computed by its owner. "copies": every rank does the whole step, as
under DDP. "shared": the same after `share_work`. They take turns step by step. All ranks start a
step together, and its time is that of the slowest rank. Waiting counts only while the step waits
for collectives, not while they run beside computation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from orthonorm.distributed import comm_report, share_work
from orthonorm.optim import Muon
from torch import nn

from .environment import describe, environment
from .report import align

WIDTH = 768  # GPT-2 small's blocks
BLOCK = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(
        prog="python -m orthonorm.bench.ranks", description=__doc__.split("\n")[0]
    )
    out.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    out.add_argument("--layers", type=int, default=4, help="blocks of GPT-2 small's matrices")
    out.add_argument("--steps", type=int, default=5, help="timed, after one that is not")
    out.add_argument(
        "--method", default="auto", choices=["auto", "gram"],
        help="gram: matrices cut along their long side are summed, not sent",
    )  # fmt: skip
    out.add_argument("--json", type=Path)
    out.add_argument("--worker", nargs=3, metavar=("RANK", "WORLD", "FOLDER"),
                     help=argparse.SUPPRESS)  # fmt: skip
    return out


class Waiting:
    """Counter of the seconds in which this process only waits for collectives."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("all_to_all_single", "all_gather", "all_reduce"):
            setattr(dist, name, self.watched(getattr(dist, name)))

    def timed(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return `f` with its time added to the seconds."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return f(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return call

    def watched(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return the collective `f` with its call, and the wait for its work, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            work = self.timed(f)(*args, **kwargs)
            return None if work is None else Watched(self.timed(work.wait))

        return call


class Watched:
    """The work of a collective whose wait is timed."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


def optimizers(layers: int, world: int, method: str) -> dict[str, Any]:
    """Make the same Muon over the same weights: as copies, as copies that share work, sharded."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh, made = init_device_mesh("cpu", (world,)), {}
    for kind in ("copies", "shared", "sharded"):
        torch.manual_seed(0)
        params = []
        for shape in BLOCK * layers:
            w, g = torch.randn(shape), torch.randn(shape)
            if kind == "sharded" and world > 1:
                w, g = (distribute_tensor(t, mesh, [Shard(0)]) for t in (w, g))
            params.append(nn.Parameter(w))
            params[-1].grad = g
        made[kind] = Muon(params, method=method)
    share_work(made["shared"])
    return made


def worker(rank: int, world: int, folder: Path, args: argparse.Namespace) -> None:
    """Time the steps on one rank, and write its figures to FOLDER/RANK.json."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    opts = optimizers(args.layers, world, args.method)
    barrier, largest = dist.barrier, dist.all_reduce
    waiting = Waiting()
    seconds: dict[str, list[float]] = {kind: [] for kind in opts}
    waits: list[float] = []
    for step in range(args.steps + 1):
        for kind, opt in opts.items():
            barrier()
            waiting.seconds, start = 0.0, time.perf_counter()
            opt.step()
            took = torch.tensor([time.perf_counter() - start, waiting.seconds])
            share = waiting.seconds / float(took[0])
            largest(took, dist.ReduceOp.MAX)
            if step:
                seconds[kind].append(float(took[0]))
            if step and kind == "sharded":
                waits.append(share)
    report = comm_report(opts["sharded"])
    found = {
        "ranks": world,
        **{kind: statistics.median(times) for kind, times in seconds.items()},
        "waiting": statistics.median(waits),
        "sent": report.sent,
        "summed": report.summed,
        "work": report.work,
        "all": seconds,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    barrier()
    dist.destroy_process_group()


def measure(world: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the ranks of a world; return the figures of each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orthonorm.bench.ranks", "--layers", str(args.layers)]
        command += ["--steps", str(args.steps), "--method", args.method, "--worker"]
        ranks = [
            subprocess.Popen([*command, str(r), str(world), folder],
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
            for r in range(world)
        ]  # fmt: skip
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise RuntimeError(f"bench: ranks ended with exit codes {codes}")
        return [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(world)]


def row(found: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the table's cells of a world, from the figures of its ranks."""
    first = found[0]
    waiting = statistics.mean(x["waiting"] for x in found)
    return (
        str(first["ranks"]), f"{1e3 * first['copies']:.0f} ms",
        *(f"{1e3 * first[kind]:.0f} ms, {first['copies'] / first[kind]:.2f}x"
          for kind in ("shared", "sharded")), f"{waiting:.0%}",
        f"{max(x['sent'] for x in found) / 1e6:.1f} MB", f"{first['summed'] / 1e6:.1f} MB",
        f"{max(x['work'] for x in found):.1%}",
    )  # fmt: skip


HEAD = (
    "ranks", "copies", "shared", "sharded", "waiting", "sent a rank", "summed", "largest work",
)  # fmt: skip


def table(name: str, record: dict[str, Any]) -> str:
    """Return a record as the table of the README."""
    where, cores = record["environment"], record["cores"]
    rows = [HEAD, ("---",) * len(HEAD), *(row(found) for found in record["runs"].values())]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    note = (
        f"Muon's step over {record['layers']} blocks of GPT-2 small "
        f"([{name}](../bench/results/{name})): {where['device']}, {cores} cores, "
        f"one thread a rank, gloo, torch {where['torch']}, {where['date'][:10]}. "
        "Copies: all of it on every rank, as under DDP; shared: the same after `share_work`; "
        "sharded: rows of every matrix on each rank, to which the last four columns belong. "
        "Waiting: the share of a step in which a rank waits for others. "
        f"More than {cores} ranks share the cores."
    )
    return "\n".join([*lines, "", note])


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.worker:
        rank, world, folder = args.worker
        worker(int(rank), int(world), Path(folder), args)
        return 0
    where = environment()
    runs = {world: measure(world, args) for world in args.ranks}
    print("\n".join(describe(where)))
    print(f"{os.cpu_count()} cores; one thread a rank; Muon, {args.layers} blocks of GPT-2 small\n")
    print("\n".join(align([HEAD, *(row(found) for found in runs.values())], left=0)))
    if args.json:
        record = {"environment": where, "cores": os.cpu_count(), "layers": args.layers,
                  "method": args.method, "steps": args.steps, "runs": runs}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
