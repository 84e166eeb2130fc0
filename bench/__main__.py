"""`python -m orthonorm bench [NAME ...]`: how fast and how exact, beside what torch offers.

NAME is an op, an optimizer step (muon, conda, adamw) or the suite `claims`, which measures what the
project promises. Without a NAME the choices are listed.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from orthonorm.ops.newton_schulz import PRECISIONS

from . import report, shapes
from .candidates import KINDS
from .cases import CASES, NAMES, STEPS, Case, Step
from .claims import Claim, record, run_claims
from .environment import describe, environment
from .inputs import DTYPE_NAMES, SPECTRA
from .measure import Request, Row, keywords, measure
from .timing import Plan

CLAIMS = "claims"


def _number(text: str, low: float, kind: type) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = low - 1
    if not value >= low:
        raise argparse.ArgumentTypeError(f"must be a number of at least {low:g}, got {text!r}")
    return float(value)


def _count(text: str) -> int:
    return int(_number(text, 1, int))


def _seconds(text: str) -> float:
    return _number(text, 1e-3, float)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; `main` prints it and returns 2."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"bench: {message}")


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="orthonorm bench", description=__doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help="op, step, or claims")
    p.add_argument("--list", action="store_true", help="list names, shapes, dtypes and spectra")
    p.add_argument(
        "--shape", nargs="+", metavar="SHAPE",
        help="64x2048x768, 12*768x768+768x3072, or a model such as gpt2-small",
    )  # fmt: skip
    p.add_argument("--dtype", nargs="+", metavar="DTYPE", help=", ".join(DTYPE_NAMES))
    p.add_argument("--precision", metavar="P", help="of Newton-Schulz: " + ", ".join(PRECISIONS))
    p.add_argument("--spectrum", metavar="S", default="gaussian", help=", ".join(SPECTRA))
    p.add_argument("--against", nargs="+", metavar="KIND", help=", ".join(KINDS) + " (all)")
    p.add_argument("--rounds", type=_count, help="rounds per row group (what fits --seconds)")
    p.add_argument("--seconds", type=_seconds, default=4.0, help="time per row group (4)")
    p.add_argument("--threads", type=_count, help="torch's threads")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument(
        "--refcheck", action=argparse.BooleanOptionalAction, default=True,
        help="error against the reference in float64 (on)",
    )  # fmt: skip
    p.add_argument("--csv", type=Path, metavar="FILE", help="append rows")
    p.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows")
    return p


def _known(label: str, value: str, choices: Sequence[str]) -> str:
    if value in choices:
        return value
    close = difflib.get_close_matches(value, choices, 3, 0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(choices)}"
    raise ValueError(f"bench: unknown {label} {value!r}; {hint}")


def requests(options: argparse.Namespace) -> list[Request]:
    """What the command line asks for, checked as a whole before anything runs."""
    found = []
    for name in options.names:
        _known("name", name, (*NAMES, CLAIMS))
        if name == CLAIMS:
            continue
        row = CASES[name] if name in CASES else STEPS[name]
        for dtype in options.dtype or row.dtypes:
            _known("dtype", dtype, DTYPE_NAMES)
            for shape in options.shape or row.shapes:
                request = Request(
                    name=name,
                    workload=shapes.parse(shape),
                    dtype=dtype,
                    spectrum=_known("spectrum", options.spectrum, tuple(SPECTRA)),
                    precision=options.precision,
                    device=options.device,
                    kinds=tuple(_known("kind", kind, KINDS) for kind in options.against or KINDS),
                    refcheck=options.refcheck,
                    plan=Plan(options.rounds, options.seconds),
                )
                _check(request)
                found.append(request)
    return found


def _check(request: Request) -> None:
    if request.precision is not None:
        _known("precision", request.precision, PRECISIONS)
        if request.name in CASES:
            keywords(CASES[request.name], request)
        elif request.name != "muon":
            raise ValueError(f"bench: {request.name} takes no precision")
    limit = CASES[request.name].limit if request.name in CASES else None
    longest = max(max(shape[-2:]) for shape in request.workload.shapes)
    if limit is not None and longest > limit:
        raise ValueError(
            f"bench: {request.name} takes sides of at most {limit}, got {request.workload.name}"
        )


def listing() -> str:
    """Every name with its default shapes and dtypes, and the choices of the options."""
    head = ("name", "dtypes", "shapes")
    table: dict[str, Case | Step] = {**CASES, **STEPS}
    rows = [(name, " ".join(row.dtypes), " ".join(row.shapes)) for name, row in table.items()]
    rows.append((CLAIMS, "", "everything the project promises, with its target"))
    return "\n".join([
        *report.align([head, *rows], left=3),
        "",
        f"models     {', '.join(shapes.MODELS)}",
        f"dtypes     {', '.join(DTYPE_NAMES)}",
        f"spectra    {', '.join(SPECTRA)}",
        f"against    {', '.join(KINDS)}",
    ])  # fmt: skip


def _measured(wanted: Sequence[Request]) -> Iterator[Row]:
    """Rows group by group, each printed as soon as it is there."""
    for i, request in enumerate(wanted, 1):
        what = f"{request.name} {request.workload.name} {request.dtype}"
        if sys.stderr.isatty():
            print(f"\r[{i}/{len(wanted)}] {what}\033[K", end="", file=sys.stderr, flush=True)
        rows = measure(request)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(report.table(rows), end="\n\n", flush=True)
        yield from rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 1 (ours failed), 2 (bad input, one sentence), 130 (interrupted)."""
    try:
        options = parser().parse_args(argv)
        if options.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"bench: device must be cpu or cuda, got {options.device!r}")
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("bench: this torch sees no CUDA device")
        wanted = requests(options)
        if options.csv:
            report.check_csv(options.csv)
        for path in (options.csv, options.json):
            if path and not path.absolute().parent.is_dir():
                raise ValueError(f"bench: {path.parent} is not a folder")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if options.list or not options.names:
            print(listing(), flush=True)
            return 0
        return run(options, wanted)
    except BrokenPipeError:  # the reader, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(options: argparse.Namespace, wanted: Sequence[Request]) -> int:
    """Measure and report; what an interrupt leaves is written too."""
    if options.threads:
        torch.set_num_threads(options.threads)
    found = environment(options.device)
    print("\n".join(describe(found)), end="\n\n")
    rows: list[Row] = []
    claims: list[Claim] = []
    code = 0
    try:
        for row in _measured(wanted):
            rows.append(row)
        if CLAIMS in options.names:
            plan = Plan(options.rounds, options.seconds)
            for claim, measured in run_claims(plan, options.device):
                claims.append(claim)
                rows += measured
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept", file=sys.stderr)
        code = 130
    if any(row.time and row.time.noisy for row in rows):
        print("! p90 is more than 1.25 times p10: noisy, run again on a quiet machine")
    if options.csv:
        report.append_csv(options.csv, rows, found)
    if options.json:
        more = {"claims": [record(claim) for claim in claims]} if claims else {}
        report.write_json(options.json, rows, found, **more)
    failed = any(row.kind == "ours" and row.note for row in rows)
    return code or int(failed)


if __name__ == "__main__":
    sys.exit(main())
