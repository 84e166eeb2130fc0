"""The command line of the benchmark, checked as a whole before anything runs."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from orthonorm.ops.newton_schulz import PRECISIONS

from . import shapes, sweep
from .candidates import KINDS
from .cases import CASES, NAMES, STEPS, Case, Step
from .inputs import DTYPE_NAMES, SPECTRA
from .items import Item
from .measure import Request, keywords
from .packages import SOURCES
from .public import ITEMS
from .timing import Plan

TASKS = {
    "claims": "measure everything the project promises, with its target",
    "cluster": "model a step on 1 to 4096 devices from measured rates (--shape: one model)",
    "static": "what the GPU kernels compile to, and the floor times that implies, without a GPU",
    "results": "write the tables of README and docs, and the index page of bench/results",
}
SLOW = ("exact", "compiled")  # kinds that the quick suite leaves out
QUICK_SECONDS = 0.22  # of a row group and pass of the quick suite
QUICK_SUITE = 110.0  # seconds of its two passes, so that it ends in two minutes on two cores
HURRIED = Plan(seconds=0.08, low=3)  # of groups behind that pace
OUTPUTS = ("csv", "json", "md", "html")


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


def _some(text: str) -> int:
    return int(_number(text, 0, int))


def _positive(text: str) -> float:
    return _number(text, 1e-3, float)


def _sweep(text: str) -> sweep.Sweep:
    try:
        return sweep.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError with one sentence; `main` prints it and returns 2."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"bench: {message}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = _Parser(
        prog="python -m orthonorm bench", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="How fast and how exact, beside what else is installed.",
    )  # fmt: skip
    p.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="op, step, nn.* and monitor.* function, all, " + ", ".join(TASKS),
    )
    _what(p.add_argument_group("what to measure"))
    _how(p.add_argument_group("how to measure"))
    _out(p.add_argument_group("what to write"))
    more = p.add_argument_group("cluster and static")
    more.add_argument("--tflops", type=_positive, help="cluster: kernel rate (measured)")
    more.add_argument("--copy", type=_positive, help="cluster: GB/s of a device's copy (measured)")
    more.add_argument("--gbps", type=_positive, default=50.0, help="cluster: GB/s a device (50)")
    more.add_argument("--latency", type=_positive, default=20.0, help="cluster: us a message (20)")
    more.add_argument("--compile", action="store_true", help="static: compile the kernels anew")
    # --processes passes --worker to its processes, which write only this JSON file
    p.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return p


def _what(what: argparse._ArgumentGroup) -> None:
    what.add_argument("--list", action="store_true", help="list names, shapes, dtypes and spectra")
    what.add_argument(
        "--shape", nargs="+", metavar="SHAPE",
        help="64x2048x768, 12*768x768+768x3072, a model such as gpt2-small, or 64xnx4n to sweep",
    )  # fmt: skip
    what.add_argument("--dtype", nargs="+", metavar="DTYPE", help=", ".join(DTYPE_NAMES))
    what.add_argument("--precision", metavar="P", help="of Newton-Schulz: " + ", ".join(PRECISIONS))
    what.add_argument(
        "--spectrum", nargs="+", default=["gaussian"], metavar="S", help=", ".join(SPECTRA)
    )
    what.add_argument("--sweep", type=_sweep, help="n=64:8192, b=1:512, threads=1:8 (doubling)")
    what.add_argument(
        "--against", nargs="+", metavar="PEER",
        help="kinds: " + ", ".join(KINDS) + "; packages: " + ", ".join(SOURCES) + " (all)",
    )  # fmt: skip
    what.add_argument("-k", dest="filter", metavar="EXPR", help="cases whose id matches, as pytest")
    what.add_argument("--quick", action="store_true", help="every op and step, two minutes in all")
    what.add_argument("--dry-run", action="store_true", help="list the cases and stop")


def _how(how: argparse._ArgumentGroup) -> None:
    how.add_argument("--rounds", type=_count, help="rounds per row group (what fits --seconds)")
    how.add_argument("--seconds", type=_positive, help="time per row group (4)")
    how.add_argument("--threads", type=_count, help="torch's threads")
    how.add_argument(
        "--processes", type=_some, default=0, metavar="N",
        help="repeat in N fresh processes, threads pinned to cores, and join the figures",
    )  # fmt: skip
    how.add_argument(
        "--passes", type=_count, metavar="N",
        help="measure everything N times, one pass after another, and join (--quick: 2, else 1)",
    )  # fmt: skip
    how.add_argument("--device", default="cpu", help="cpu or cuda")
    how.add_argument("--memory", action="store_true", help="peak memory of a call on CPUs too")
    how.add_argument(
        "--refcheck", action=argparse.BooleanOptionalAction, default=True,
        help="error against the reference in float64 (on)",
    )  # fmt: skip
    how.add_argument(
        "--ceilings", action=argparse.BooleanOptionalAction, default=True,
        help="measure the machine's copy and product rates first (on)",
    )  # fmt: skip


def _out(out: argparse._ArgumentGroup) -> None:
    out.add_argument("--load", type=Path, metavar="FILE", help="take a run's JSON, do not measure")
    out.add_argument(
        "--json", type=Path, metavar="FILE", help="the run: all the rest is made of it"
    )
    out.add_argument("--csv", type=Path, metavar="FILE", help="append rows")
    out.add_argument("--md", type=Path, metavar="FILE", help="Markdown tables")
    out.add_argument("--html", type=Path, metavar="FILE", help="one self-contained page")
    out.add_argument("--plots", type=Path, metavar="DIR", help="PNG plots (needs matplotlib)")
    out.add_argument("--compare", type=Path, metavar="OLD", help="what moved since that run's JSON")
    out.add_argument(
        "--threshold", type=_positive, default=5.0, metavar="PERCENT",
        help="slower by more, beyond noise, fails --compare (5)",
    )  # fmt: skip


def known(label: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is a choice; otherwise raise ValueError with similar choices."""
    if value in choices:
        return value
    close = difflib.get_close_matches(value, choices, 3, 0.6)
    if close:
        hint = f"did you mean {' or '.join(close)}? --list has all"
    else:
        hint = f"choose from {', '.join(choices)}"
    raise ValueError(f"bench: unknown {label} {value!r}; {hint}")


def matches(expression: str, text: str) -> bool:
    """True if an expression of words, and, or, not and parentheses holds for a text.

    A word holds if the text contains it, as in pytest's -k.
    """

    def holds(word: re.Match[str]) -> str:
        plain = word[0] in ("and", "or", "not")
        return word[0] if plain else str(word[0].lower() in text.lower())

    try:
        return bool(eval(re.sub(r"[^\s()]+", holds, expression), {"__builtins__": {}}))
    except (SyntaxError, TypeError):
        raise ValueError(
            f"bench: -k takes words joined by and, or, not, got {expression!r}"
        ) from None


def chosen(names: Sequence[str], everything: bool) -> Iterator[tuple[str, Case | Step | Item]]:
    """Yield (name, row) for the rows of the tables that are named."""
    for name in names:
        known("name", name, (*NAMES, *ITEMS, "all", *TASKS))
    wanted = NAMES if "all" in names or (not names and everything) else names
    for name in wanted:
        if name not in TASKS:
            yield name, {**CASES, **STEPS, **ITEMS}[name]


def _shapes(options: argparse.Namespace, row: Case | Step | Item) -> Iterator[tuple[str, str]]:
    """Yield (shape, value of the sweep or "") for every workload of a row."""
    texts = options.shape or (
        [row.quick or row.shapes[0]] if options.quick else list(row.shapes)
    )  # fmt: skip
    if options.sweep is None:
        yield from ((text, "") for text in texts)
    elif options.sweep.variable == sweep.THREADS:
        for text in texts if options.shape else texts[:1]:
            yield from ((text, f"{sweep.THREADS}={value}") for value in options.sweep.values)
    else:
        name, values = options.sweep
        for text in options.shape or [sweep.DEFAULTS.get(name, f"{name}x{name}")]:
            yield from ((sweep.substitute(text, name, v), f"{name}={v}") for v in values)


def requests(options: argparse.Namespace) -> list[Request]:
    """Return the measurements that the command line asks for, all of them checked."""
    everything = options.quick or options.dry_run or options.filter is not None
    against = tuple(options.against or [k for k in KINDS if not (options.quick and k in SLOW)])
    for peer in against:
        known("peer", peer, (*KINDS, *SOURCES))
    seconds = options.seconds or (QUICK_SECONDS if options.quick else 4.0)
    found = []
    for name, row in chosen(options.names, everything):
        for dtype in options.dtype or row.dtypes[: 1 if options.quick else None]:
            for shape, varied in _shapes(options, row):
                for spectrum in options.spectrum:
                    request = Request(
                        name=name, workload=shapes.parse(shape), sweep=varied,
                        dtype=known("dtype", dtype, DTYPE_NAMES), precision=options.precision,
                        spectrum=known("spectrum", spectrum, tuple(SPECTRA)),
                        device=options.device, kinds=against, refcheck=options.refcheck,
                        plan=Plan(options.rounds, seconds), memory=options.memory,
                        threads=options.threads,
                    )  # fmt: skip
                    if varied.startswith(sweep.THREADS):
                        request = replace(request, threads=int(varied.split("=")[1]))
                    _check(request)
                    if options.filter is None or matches(options.filter, request.id):
                        found.append(request)
    if options.filter is not None and not found and "static" not in options.names:
        raise ValueError(f"bench: no case matches -k {options.filter!r}; see --dry-run")
    return found


def _check(request: Request) -> None:
    """Raise ValueError if the op or step cannot take the precision or the shapes."""
    if request.precision is not None:
        known("precision", request.precision, PRECISIONS)
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


def check_device(device: str) -> None:
    """Raise ValueError unless the device exists."""
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("bench: this torch sees no CUDA device")


def check_paths(options: argparse.Namespace) -> None:
    """Raise ValueError if the folder of an output does not exist."""
    for path in (getattr(options, name) for name in (*OUTPUTS, "plots")):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"bench: {path.parent} is not a folder")
