"""Measure the tables from which choices are made at run time.

    python -m orthonorm.bench.tune --out FOLDER [--seconds S] [--dtype float16]

With a GPU: sweep launch records of the product kernel, find the side from which separate products
are faster than a chain in one launch, and write tables for `kernels/configs/`.
Without: time the forms of the Newton-Schulz iteration and the function of `torch.optim.Muon` in the
same rounds, and write this processor's row of `orthonorm/rates.json`.

For each tile shape the sweep keeps the fastest warps and stages. It begins with the stored records,
so that a sweep cut short is no worse than they are. All are timed in CUDA graphs. Of these records
it keeps those that are fastest for some side, largest first, which is the order that `configs.pick`
reads. It also stores the side from which torch is faster. All records share block_k, so that no
choice changes a result.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from orthonorm import orthogonalize as k1
from orthonorm._polynomials import KELLER
from orthonorm.ops import gram_polynomial, newton_schulz
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from .cuda import replayed
from .environment import environment
from .timing import Plan, interleave, quantile

SIDES = (768, 1024, 2048, 4096)
SHAPES = {
    "symmetric": ((128, 128), (64, 64)),
    "product": ((128, 256), (128, 128), (64, 128), (64, 64)),
}
WARPS, STAGES = (8, 4), (3, 4, 5)
CHAIN_SIDES = (96, 128, 160, 192, 256)


@contextlib.contextmanager
def tables_laid() -> Iterator[None]:
    """Lay tables on the device before a call is captured, as calls outside of graphs find them.

    A graph writes them in every replay, which would be timed with the kernel.
    """
    tables = importlib.import_module("orthonorm.kernels.tables")
    laid: dict[tuple[int, ...], Tensor] = {}
    own = tables.upload

    def upload(values: tuple[int, ...], device: torch.device, earlier: Any = None) -> Tensor:
        if values not in laid:
            laid[values] = tables.copied(values, device)
        return laid[values]

    tables.upload = upload
    try:
        yield
    finally:
        tables.upload = own


def seconds_of(call: Callable[[], object]) -> float:
    """Return the seconds in a CUDA graph; infinite if the record does not fit the device."""
    try:
        with tables_laid():
            call()
            return replayed(call)
    except Exception as error:  # the module of Triton's OutOfResources differs between versions
        if "resource" not in type(error).__name__.lower() + str(error).lower():
            raise
        return math.inf


def launcher(
    op: str, side: int, dtype: torch.dtype, device: str = "cuda"
) -> Callable[[Any], Tensor]:
    """Return the function that launches X X^T or X + B X, of this side, with a given record."""
    product = importlib.import_module("orthonorm.kernels.product")
    tables = importlib.import_module("orthonorm.kernels.tables")
    tensors = [torch.randn(side, side, device=device).to(dtype) for _ in range(3)]
    ((x, b, o),) = tables.views(*tensors)
    symmetric = op == "symmetric"
    factors = product.plain(x, x.mT, o, o) if symmetric else product.plain(b, x, x, o)
    beta = 0.0 if symmetric else 1.0

    def launch(record: Any) -> Tensor:
        product.product(
            op,
            [factors],
            tensors[0].device,
            dtype,
            1.0,
            beta,
            symmetric=symmetric,
            records=[record],
        )
        return tensors[-1]  # keeps the tensors alive: views hold only addresses

    return launch


def torch_seconds(op: str, side: int, dtype: torch.dtype) -> float:
    """Return the seconds of the same product by torch."""
    X, B = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
    return seconds_of(lambda: X @ X.mT if op == "symmetric" else torch.addmm(X, B, X))


def torch_from(ours: dict[int, float], torchs: dict[int, float]) -> int | None:
    """Return the smallest side from which torch is faster; None if it is not at the largest."""
    found = None
    for side in sorted(ours, reverse=True):
        if torchs[side] >= ours[side]:
            break
        found = side
    return found


def fitting(op: str, known: Sequence[Any], block_k: int, shared: int) -> list[Any]:
    """Return the records to measure: known ones, then all whose tiles fit the shared memory."""
    configs = importlib.import_module("orthonorm.kernels.configs")
    shapes = dict.fromkeys([*SHAPES[op], *((r.block_m, r.block_n) for r in known)])
    every = (
        configs.Config(*shape, block_k, warps, stages)
        for shape, warps, stages in itertools.product(shapes, WARPS, STAGES)
    )
    fit = (r for r in every if (r.block_m + r.block_n) * block_k * 2 * r.stages <= shared)
    return list(dict.fromkeys([*known, *fit]))


def sweep(
    op: str, dtype: torch.dtype, block_k: int, deadline: float, stored: Sequence[Any], shared: int
) -> tuple[list[Any], int | None]:
    """Measure a row of a table; return its records and the side from which torch is faster.

    `stored` records are measured whatever the deadline; `shared` bytes are a block's memory.
    """
    known = [r for r in stored if r.block_k == block_k]
    launchers = {side: launcher(op, side, dtype) for side in SIDES}
    best: dict[tuple[int, int], tuple[Any, dict[int, float]]] = {}
    for record in fitting(op, known, block_k, shared):
        if time.monotonic() > deadline and best and record not in known:
            break
        shape = record.block_m, record.block_n
        times = {s: seconds_of(lambda r=record, f=f: f(r)) for s, f in launchers.items()}
        print(op, dtype, record, {s: f"{t * 1e6:.1f} us" for s, t in times.items()}, flush=True)
        if shape not in best or sum(times.values()) < sum(best[shape][1].values()):
            best[shape] = record, times
    winners = {min(best, key=lambda s: best[s][1][side]) for side in SIDES}
    ours = {side: min(times[side] for _, times in best.values()) for side in SIDES}
    torchs = {side: torch_seconds(op, side, dtype) for side in SIDES}
    print(op, dtype, "torch", {s: f"{t * 1e6:.1f} us" for s, t in torchs.items()}, flush=True)
    largest_first = sorted(winners, key=lambda s: (s[0] * s[1], s[1]), reverse=True)
    return [best[s][0] for s in largest_first], torch_from(ours, torchs)


def chain_from(
    dtype: torch.dtype, sides: Sequence[int] = CHAIN_SIDES, batch: int = 12, device: str = "cuda"
) -> int:
    """Return the side from which separate products are faster than `gram_polynomial` in a launch.

    Measured on a batch of matrices.
    """
    ours, words = {}, {}
    kernels = importlib.import_module("orthonorm.kernels.gram_polynomial")
    triples = [KELLER] * 5
    flat = [number for triple in triples for number in triple]
    for side in sides:
        X = torch.randn(batch, side, side, device=device) / side
        R = (X @ X.mT).to(dtype)
        ours[side] = seconds_of(lambda R=R: kernels.gram_polynomial(R, flat))
        words[side] = seconds_of(lambda R=R: kernels.by_products(R, triples))
        print("chain", dtype, side, f"{ours[side] * 1e6:.1f} us", f"{words[side] * 1e6:.1f} us")
    return torch_from(ours, words) or sides[-1] + 1


def stored(op: str, arch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the stored table of an op, and its row for an architecture as a copy to change."""
    configs = importlib.import_module("orthonorm.kernels.configs")
    table = json.loads((configs.FOLDER / f"{op}.json").read_text())
    row = table.get(arch, {})
    table[arch] = row = dict(table[row] if isinstance(row, str) else row)
    row["torch_from"] = dict(row.get("torch_from", {}))
    return table, row


# ---- CPU: rates of the forms ---------------------------------------------------------------------
CPU_SIDES = (256, 512, 1024)
ASPECT = 4


def measure_rates(plan: Plan) -> dict[str, list[float]]:
    """Measure the GFLOP/s of every part of `orthogonalize.work`, at the lowest decile of times.

    One iteration with c = 0 in Gram form is a sweep alone, because its chain has no product.
    """
    triple, line = KELLER, (1.0, 1.0, 0.0)
    rates: dict[str, list[float]] = {"sides": []}
    for n in CPU_SIDES:
        X = [torch.randn(n, ASPECT * n)]
        R = torch.eye(n)
        calls: dict[str, tuple[float, Callable[[], Any]]] = {}
        whole = k1.work(ASPECT, [triple] * 5, [])
        calls["torch"] = (
            whole["torch"], functools.partial(_zeropower_via_newtonschulz, X[0], triple, 5, 1e-7)
        )  # fmt: skip
        calls["chain"] = whole["chain"], functools.partial(gram_polynomial, R, [*triple] * 5)
        for kind in ("float32", "bfloat16"):
            for part, form, numbers in (
                ("direct", "direct", [*triple] * 5),
                ("sweep", "gram", line),
            ):
                work = whole[part]
                call = functools.partial(newton_schulz, X, [*numbers], [], form, kind)
                calls[f"{part} {kind}"] = work, call
        samples = interleave({name: call for name, (_, call) in calls.items()}, plan, "cpu")
        rates["sides"].append(n)
        for name, times in samples.items():
            rate = round(calls[name][0] * n**3 / quantile(times, 0.1) / 1e9)
            rates.setdefault(name, []).append(rate)
            print(n, name, rate, "GFLOP/s", flush=True)
    return rates


def tune_cpu(out: Path, seconds: float) -> None:
    """Measure this processor's rates and write them to OUT/rates.json."""
    where = environment()
    rates = measure_rates(Plan(seconds=seconds / len(CPU_SIDES)))
    source = f"measured: {where['device']}, {where['threads']} threads, {where['date'][:10]}"
    if (where["load"] or 0) > where["threads"]:
        source += ": other work was running, so ratios hold, not rates"
    table = json.loads((Path(k1.__file__).parent / "rates.json").read_text())
    table[k1.processor()] = {"source": source, "rates": rates}
    rows = ",\n".join(f' "{name}": {json.dumps(row)}' for name, row in table.items())
    (out / "rates.json").write_text("{\n" + rows + "\n}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m orthonorm.bench.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--seconds", type=float, default=50.0, help="about how long (50)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        return tune_cpu(options.out, options.seconds)
    configs = importlib.import_module("orthonorm.kernels.configs")
    arch, _ = configs.device_of(torch.device("cuda"))
    dtype = getattr(torch, options.dtype)
    device = torch.cuda.get_device_properties("cuda")
    shared = int(device.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    start = time.monotonic()
    for i, op in enumerate(SHAPES, 1):
        deadline = start + options.seconds * i / len(SHAPES)
        block_k = 64 if int(arch) >= 90 else 32
        known = configs.records(op, dtype, arch)
        records, limit = sweep(op, dtype, block_k, deadline, known, shared)
        table, row = stored(op, arch)
        row[options.dtype] = [asdict(r) for r in records]
        row["torch_from"].pop(options.dtype, None)
        if limit is not None:
            row["torch_from"][options.dtype] = limit
        (options.out / f"{op}.json").write_text(json.dumps(table, indent=1) + "\n")
    table, row = stored("chain", arch)
    row["torch_from"][options.dtype] = chain_from(dtype)
    (options.out / "chain.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
