"""Measurement: one op or step on one workload, every candidate in the same rounds, errors beside.

The error column is the relative Frobenius error of everything a candidate produced against the
reference in float64, on one matrix of each shape; the timed inputs are separate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import candidates, steps
from .candidates import Peer, Running, Unavailable
from .cases import CASES, STEPS, Case, Outputs, Step
from .inputs import DTYPES, Arguments, Inputs, copied, doubled
from .peers import peers
from .shapes import Workload, describe
from .timing import Plan, Stats, interleave, median_ratio, ratio_of_medians, stats


@dataclass(frozen=True)
class Request:
    """What to measure: a row group of the table."""

    name: str
    workload: Workload
    dtype: str = "float32"
    spectrum: str = "gaussian"
    precision: str | None = None
    device: str = "cpu"
    kinds: tuple[str, ...] = candidates.KINDS
    refcheck: bool = True
    plan: Plan = field(default_factory=Plan)

    @property
    def inputs(self) -> Inputs:
        return Inputs.named(self.dtype, device=self.device, spectrum=self.spectrum)

    @property
    def command(self) -> str:
        """What measures this again."""
        parts = ["python -m orthonorm bench", self.name, "--shape", self.workload.name]
        parts += ["--dtype", self.dtype, "--spectrum", self.spectrum]
        parts += ["--precision", self.precision] if self.precision else []
        return " ".join(parts)


@dataclass(frozen=True)
class Row:
    """One candidate's figures; `note` says why there are none."""

    name: str
    shape: str
    dtype: str
    spectrum: str
    precision: str
    backend: str
    kind: str
    time: Stats | None = None
    ratio: float | None = None  # its median over ours
    round_ratio: float | None = None  # median over rounds of its time over ours
    rate: float | None = None  # nominal FLOP/s, or least bytes per second
    unit: str = ""
    error: float | None = None
    note: str = ""
    command: str = ""


def relative_error(got: Outputs, want: Outputs) -> float | None:
    """Largest |got - want|_F / |want|_F over the outputs both have; None if they share none."""
    worst = None
    for name in got.keys() & want.keys():
        off = scale = 0.0
        for a, b in zip(got[name], want[name], strict=True):
            wide = b.double()
            off += float((a.double().reshape(wide.shape) - wide).square().sum())
            scale += float(wide.square().sum())
        error = math.sqrt(off / scale) if scale else math.sqrt(off)
        worst = error if worst is None else max(worst, error)
    return worst


def keywords(case: Case, request: Request) -> Arguments:
    """The command line's precision as this op spells it."""
    if request.precision is None:
        return {}
    names = {a.name for a in case.schema.arguments}
    if "precision" in names:
        return {"precision": request.precision}
    if case.name == "small_newton_schulz" and request.precision in DTYPES:
        return {"dtype": DTYPES[request.precision]}
    raise ValueError(f"bench: {case.name} takes no precision {request.precision!r}")


def _error(start: Callable[[], Running], truth: Outputs | None) -> float | None:
    """A candidate's error in one call on inputs of its own."""
    if truth is None:
        return None
    running = start()
    return relative_error(running.outputs(running.call()), truth)


Begin = Callable[[bool], Running]  # started on the error inputs (True) or on the timed ones


class _Prepared:
    """Candidates of one request, made ready: calls to time, errors, notes."""

    def __init__(self, work: float, unit: str, truth: Outputs | None) -> None:
        self.work, self.unit, self.truth = work, unit, truth
        self.calls: dict[str, Callable[[], Any]] = {}
        self.kinds: dict[str, str] = {}
        self.errors: dict[str, float | None] = {}
        self.notes: dict[str, str] = {}
        self.works: dict[str, float] = {}

    def add(self, label: str, kind: str, begin: Begin) -> None:
        self.kinds[label] = kind
        try:
            if self.truth is not None:
                running = begin(True)
                self.errors[label] = relative_error(running.outputs(running.call()), self.truth)
            running = begin(False)
            self.calls[label] = running.timed or running.call
            self.works[label] = self.work if running.work is None else running.work
        except Unavailable as reason:
            self.notes[label] = str(reason)
        except (RuntimeError, NotImplementedError) as failure:
            self.notes[label] = f"failed: {str(failure).splitlines()[0][:160]}"


def _prepare_op(case: Case, request: Request) -> _Prepared:
    extra = keywords(case, request)
    small = case.calls(request.workload.distinct(), request.inputs, **extra)
    timed = case.calls(request.workload, request.inputs, **extra)
    truth = None
    if request.refcheck:
        oracle = candidates.start_reference(case, [doubled(a) for a in small])
        truth = oracle.outputs(oracle.call())
    work, unit = sum(case.flops(a) for a in timed), "FLOP/s"
    if not work:
        work, unit = candidates.bytes_moved(case, timed), "B/s"
    prepared = _Prepared(work, unit, truth)
    probe = candidates.start_ours(case, [copied(a) for a in small])
    label = candidates.served_by(probe.call)
    ours = Peer(label, "ours", candidates.start_ours)
    for peer in (ours, *peers(case, timed)):
        if peer is not ours and (peer.kind not in request.kinds or peer.label == label):
            continue

        def begin(on_small: bool, peer: Peer = peer) -> Running:
            # Timed candidates share their inputs: repeated calls keep every state in range.
            return peer.start(case, [copied(a) for a in small] if on_small else timed)

        prepared.add(peer.label, peer.kind, begin)
    return prepared


def _prepare_step(step: Step, request: Request) -> _Prepared:
    small = steps.Model(request.workload.distinct(), request.inputs)
    model = steps.Model(request.workload, request.inputs)
    work, unit = sum(step.flops(w) for w in model.params), "FLOP/s"
    if not work:
        work, unit = steps.bytes_moved(step, model), "B/s"
    prepared = _Prepared(work, unit, steps.truth(step, small) if request.refcheck else None)
    label = steps.label(step, small, request.precision)
    for entrant in steps.entrants(step, label, request.precision):
        if entrant.kind in ("ours", *request.kinds):

            def begin(on_small: bool, start: steps.Start = entrant.start) -> Running:
                return start(small if on_small else model)

            prepared.add(entrant.label, entrant.kind, begin)
    return prepared


def measure(request: Request) -> list[Row]:
    """Rows of every candidate, ours first."""
    if request.name in CASES:
        prepared = _prepare_op(CASES[request.name], request)
    else:
        prepared = _prepare_step(STEPS[request.name], request)
    samples = interleave(prepared.calls, request.plan, request.device)
    return [_row(request, prepared, samples, label) for label in prepared.kinds]


def _row(
    request: Request, prepared: _Prepared, samples: Mapping[str, Sequence[float]], label: str
) -> Row:
    ours = next(iter(prepared.kinds))
    times, base = samples.get(label), samples.get(ours)
    found = stats(times) if times else None
    work = prepared.works.get(label, 0.0)
    if work != prepared.work:
        base = None  # another amount of work: its rate compares, its time does not
    return Row(
        name=request.name,
        shape=describe(request.workload.shapes),
        dtype=request.dtype,
        spectrum=request.spectrum,
        precision=request.precision or "",
        backend=label,
        kind=prepared.kinds[label],
        time=found,
        ratio=ratio_of_medians(times, base) if times and base else None,
        round_ratio=median_ratio(times, base) if times and base else None,
        rate=work / found.median if found and work else None,
        unit=prepared.unit,
        error=prepared.errors.get(label),
        note=prepared.notes.get(label, ""),
        command=request.command,
    )
