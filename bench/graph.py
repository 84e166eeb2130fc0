"""Whole steps captured in a CUDA graph and replayed: what a step costs without the CPU's part.

    python -m orthonorm.bench.graph [NAME ...] [--shape S] [--dtype D ...] [--json FILE]

NAME is an op (muon_step_ and conda_step_ if none is given). On the CPU, where nothing can be
captured, calls are timed as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from orthonorm.ops.newton_schulz import PRECISIONS

from . import report, shapes, timing
from .cases import CASES
from .environment import environment
from .inputs import DTYPE_NAMES, Inputs
from .measure import Row

STEPS = ("muon_step_", "conda_step_")


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replays of `call`, which is first run aside so that nothing is compiled while capturing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measured(
    name: str, workload: shapes.Workload, dtype: str, precision: str | None, device: str,
    seconds: float,
) -> list[Row]:  # fmt: skip
    """Rows of one op on one workload: eager and, on a GPU, captured."""
    case = CASES[name]
    inputs = Inputs.named(dtype, device=device)
    keywords = {"precision": precision} if precision and name == "muon_step_" else {}
    (arguments,) = case.calls(workload, inputs, **keywords)

    def call() -> None:
        case.op.overload(**arguments)

    calls: dict[str, Callable[[], object]] = {"eager": call}
    if device != "cpu":
        calls["CUDA graph"] = captured(call)
    plan = timing.Plan(None, seconds)
    work = case.flops(arguments)
    rows = []
    for label, samples in timing.interleave(calls, plan, device).items():
        stats = timing.stats(samples)
        rows.append(
            Row(
                name=name, shape=workload.name, dtype=dtype, spectrum=inputs.spectrum,
                precision=precision or "", backend=label, kind="ours", time=stats,
                rate=work / stats.median, unit="FLOP/s",
            )
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="graph", description=__doc__)
    parser.add_argument("names", nargs="*", default=STEPS, metavar="NAME")
    parser.add_argument("--shape", default="gpt2-small")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=DTYPE_NAMES)
    parser.add_argument("--precision", choices=PRECISIONS, help="of muon_step_")
    parser.add_argument("--tf32", action="store_true", help="float32 products by tensor cores")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per row group (2)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    found: list[Row] = []
    for name in options.names:
        for dtype in options.dtype:
            found += measured(
                name, shapes.parse(options.shape), dtype, options.precision, options.device,
                options.seconds,
            )  # fmt: skip
            print(report.table(found[-2 if options.device != "cpu" else -1 :]), flush=True)
    if options.json:
        report.write_json(options.json, found, environment(options.device), tf32=options.tf32)


if __name__ == "__main__":
    main()
