"""`python -m orthonorm bench [NAME ...]`: measure speed and error beside other packages.

    options -> requests -> measure -> records -> outputs

NAME is an op, an optimizer step (muon, conda, adamw, ...), `all` of these, a public function of
orthonorm.nn or orthonorm.monitor (nn.hard_cap), or a task: `claims`, `cluster`, `static`,
`results`. Without a NAME it lists the choices.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch

from . import (
    ceilings,
    claims,
    cluster,
    compare,
    page,
    plots,
    processes,
    records,
    report,
    results,
    shapes,
    static,
    sweep,
)
from .candidates import KINDS
from .cases import CASES, STEPS, Case, Step
from .environment import describe, environment
from .inputs import DTYPE_NAMES, SPECTRA
from .items import Item
from .measure import Request, measure
from .options import HURRIED, QUICK_SUITE, TASKS, check_device, check_paths, parser, requests
from .packages import SOURCES
from .public import ITEMS
from .records import DRIFT, Record, Run, one_each
from .timing import Plan


def listing() -> str:
    """Return the text of --list: every name, its default shapes and dtypes, and all choices."""
    head = ("name", "dtypes", "shapes")
    table: dict[str, Case | Step | Item] = {**CASES, **STEPS, **ITEMS}
    rows = [(name, " ".join(row.dtypes), " ".join(row.shapes)) for name, row in table.items()]
    return "\n".join([
        *report.align([head, *rows], left=3),
        "",
        *report.align([("task", "what it does"), *TASKS.items()], left=2),
        "",
        f"models     {', '.join(shapes.MODELS)}",
        f"dtypes     {', '.join(DTYPE_NAMES)}",
        f"spectra    {', '.join(SPECTRA)}",
        f"against    {', '.join(KINDS)}",
        f"packages   {', '.join(SOURCES)}",
    ])  # fmt: skip


def cases_of(wanted: Sequence[Request]) -> str:
    """Return the text of --dry-run: the cases, and the command that measures each."""
    return "\n".join(report.align([(r.id, r.command) for r in wanted], left=2))


def _progress(text: str = "") -> None:
    """Show progress: on a terminal in one line that is overwritten, else as new lines."""
    if sys.stderr.isatty():
        print(f"\r{text[:99]}\033[K", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def _measured(
    wanted: Sequence[Request], passes: int, limits: bool, quick: bool
) -> Iterator[list[Record]]:
    """Measure the requests, all of them in each pass; yield and print the records of each group.

    Repeated passes are neither printed nor checked for errors. Those of the quick suite leave out
    the definitions, which are slow, and its groups that are behind its pace take only HURRIED.
    """
    start = time.monotonic()
    visits = [(again, request) for again in range(passes) for request in wanted]
    for done, (again, request) in enumerate(visits):
        passed = time.monotonic() - start
        left = passed / max(1, done) * (len(visits) - done)
        about = f", about {left:.0f} s left" if done else ""
        _progress(f"[{done + 1}/{len(visits)}{about}] {request.id}")
        threads = request.threads or torch.get_num_threads()
        rates = ceilings.measured(request.device, threads) if limits else {}
        late = quick and passed > QUICK_SUITE * done / len(visits)
        plan = HURRIED if late and request.plan.rounds is None else request.plan
        kinds = tuple(k for k in request.kinds if not (quick and again and k == "reference"))
        judged = request.refcheck and not again
        found = measure(replace(request, limits=rates, plan=plan, kinds=kinds, refcheck=judged))
        _progress()
        if not again:
            print(report.table(found), end="\n\n", flush=True)
        yield found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code.

    0: success. 1: one of ours failed or moved. 2: bad input, said in a line. 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser().parse_args(argv)
        check_device(options.device)
        wanted = requests(options)
        check_paths(options)
        if options.csv:
            report.check_csv(options.csv)
        if options.plots:
            plots.check()
        old = records.load(options.compare) if options.compare else None
        loaded = records.load(options.load) if options.load else None
        if old and loaded:
            compare.check_comparable(loaded, old)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if options.list or not (options.names or wanted or loaded):
            print(listing(), flush=True)
            return 0
        if options.dry_run:
            print(cases_of(wanted), flush=True)
            return 0
        return run(options, argv, wanted, loaded, old)
    except (ValueError, RuntimeError) as error:
        if not str(error).startswith("bench: "):
            raise
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(
    options: argparse.Namespace, argv: Sequence[str], wanted: Sequence[Request],
    loaded: Run | None, old: Run | None,
) -> int:  # fmt: skip
    """Measure or load a run, then write the outputs asked for; also after an interrupt."""
    if options.threads:
        torch.set_num_threads(options.threads)
    code = 0
    if loaded is not None:
        found = loaded
        print(report.table(found.records), end="\n\n")
    elif options.processes:
        found, code = processes.repeat(argv, options.processes, options.threads)
        print("\n".join(describe(found.environment)), report.table(found.records), sep="\n\n")
    else:
        found = Run(environment(options.device))
        if old is not None:
            compare.check_comparable(found, old)
        code = _run_here(options, wanted, found)
    _write(options, found)
    if found.records and not found.claims:  # the table of claims has other columns
        print("\n".join(report.legend(found.records)), flush=True)
    for line in sweep.report(found.records):
        print(line)
    if old is not None:
        text, failed = compare.report(found, old, options.threshold / 100)
        print(text)
        code = code or int(failed)
    return code or int(any(r.kind == "ours" and r.median_ms is None for r in found.records))


def _run_here(options: argparse.Namespace, wanted: Sequence[Request], found: Run) -> int:
    """Measure in this process into `found`, and save it after every group.

    A disturbance of the machine may outlast a group. Each further pass therefore measures all
    groups again, and rows whose medians moved between passes are flagged.
    """
    if wanted or {"claims", "cluster"} & set(options.names):
        print("\n".join(describe(found.environment)), end="\n\n", flush=True)
    file = options.worker or options.json
    plan = Plan(options.rounds, options.seconds or 4.0)
    passes = options.passes or (2 if options.quick else 1)
    visits: list[Record] = []

    def keep(records: list[Record]) -> None:
        found.records = records
        if file:
            found.save(file)

    try:
        if options.ceilings and (wanted or "claims" in options.names):
            found.ceilings = ceilings.measured(options.device, torch.get_num_threads())
        for group in _measured(wanted, passes, options.ceilings, options.quick):
            visits.extend(group)
            keep(one_each(visits))
        if moved := [r for r in found.records if passes > 1 and abs(r.drift or 0.0) > DRIFT]:
            print(f"apart by over {DRIFT:.0%} between passes:", report.table(moved), sep="\n\n")
        if "claims" in options.names:
            for claim, group in claims.run_claims(plan, options.device, found.ceilings):
                found.claims.append(asdict(claim) | {"held": claim.held})
                keep([*found.records, *group])
        for task in (cluster, static, results):
            if task.__name__.rpartition(".")[2] in options.names:
                task.main(options, found)
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept", file=sys.stderr)
        return 130
    return 0


def _write(options: argparse.Namespace, found: Run) -> None:
    """Write the outputs; each is made from the run alone."""
    if options.worker:
        found.save(options.worker)
        return
    if options.json:
        found.save(options.json)
    if options.csv:
        report.append_csv(options.csv, found.records, found.environment)
    if options.md:
        options.md.write_text(report.markdown(found))
    if options.html:
        options.html.write_text(page.page([found]))
    if options.plots:
        with contextlib.suppress(KeyboardInterrupt):
            plots.write(options.plots, found)


if __name__ == "__main__":
    sys.exit(main())
