"""Measurement of one op or step on one workload: times of all candidates in shared rounds, errors.

Errors are judged on one matrix of each shape; the timed inputs are separate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import candidates, ceilings, cuda, steps
from .candidates import Peer, Running, Unavailable
from .cases import CASES, STEPS, Case, Outputs, Step
from .environment import peak_extra_memory
from .inputs import DTYPES, Arguments, Inputs, copied, doubled
from .items import Item, flat, wide
from .judge import PolarJudge, Verdict, relative_error
from .peers import peers
from .public import ITEMS
from .records import Record
from .shapes import Workload
from .timing import Plan, interleave, median_ratio, ratio_of_medians, stats


@dataclass(frozen=True)
class Request:
    """One measurement to make, which gives a group of rows.

    Attributes:
        kinds: kinds of candidates (`candidates.KINDS`) and packages to measure beside ours.
        sweep: value of a sweep, such as "n=512".
        threads: number of torch's threads; None leaves it unchanged.
        memory: True measures peak memory on CPUs too (two more calls).
        limits: the machine's ceilings (`ceilings.measured`) to compare the rows with.
    """

    name: str
    workload: Workload
    dtype: str = "float32"
    spectrum: str = "gaussian"
    precision: str | None = None
    device: str = "cpu"
    kinds: tuple[str, ...] = candidates.KINDS
    refcheck: bool = True
    plan: Plan = field(default_factory=Plan)
    sweep: str = ""
    threads: int | None = None
    memory: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> Inputs:
        return Inputs.named(self.dtype, device=self.device, spectrum=self.spectrum)

    @property
    def id(self) -> str:
        """Identifier that `-k` filters, as pytest does."""
        parts = (self.name, self.workload.name, self.dtype, self.spectrum, self.precision or "")
        return "-".join(p for p in (*parts, self.sweep) if p)

    @property
    def command(self) -> str:
        """Command that repeats this measurement."""
        parts = ["python -m orthonorm bench", self.name, "--shape", self.workload.name]
        parts += ["--dtype", self.dtype]
        parts += ["--spectrum", self.spectrum] if self.spectrum != "gaussian" else []
        parts += ["--precision", self.precision] if self.precision else []
        parts += ["--threads", str(self.threads)] if self.threads else []
        parts += ["--device", self.device] if self.device != "cpu" else []
        return " ".join(parts)

    @property
    def product_dtype(self) -> str:
        """Name of the dtype of our products; "fastest" if they may choose."""
        if self.precision in DTYPES:
            return self.precision
        chooses = self.name in ("newton_schulz", "muon_step_", "muon")
        if chooses and self.precision in (None, "auto"):
            return ceilings.FASTEST
        return self.dtype if self.dtype in DTYPES else "bfloat16"


def keywords(case: Case, request: Request) -> Arguments:
    """Return the keywords by which this op takes the precision of the command line."""
    if request.precision is None:
        return {}
    names = {a.name for a in case.schema.arguments}
    if "precision" in names:
        return {"precision": request.precision}
    if case.name == "small_newton_schulz" and request.precision in DTYPES:
        return {"dtype": DTYPES[request.precision]}
    raise ValueError(f"bench: {case.name} takes no precision {request.precision!r}")


Begin = Callable[[bool], Running]  # starts a candidate on the judged inputs (True) or timed ones


@dataclass
class _Candidate:
    """One prepared candidate: the call to time, and the verdicts on its results."""

    label: str
    kind: str
    flops: float
    dtype: str
    call: Callable[[], Any] | None = None
    error: float | None = None
    verdict: Verdict | None = None
    note: str = ""


def reason(failure: Exception) -> str:
    """Return in one line why a candidate has no figures."""
    if isinstance(failure, Unavailable):
        return str(failure)
    lines = str(failure).splitlines() or [type(failure).__name__]
    return f"failed: {lines[0][:160]}"


class _Prepared:
    """Prepared candidates of one request, and the work that all of them do."""

    def __init__(
        self, request: Request, flops: float, traffic: float, truth: Outputs | None,
        judge: PolarJudge | None = None,
    ) -> None:  # fmt: skip
        self.request, self.flops, self.traffic = request, flops, traffic
        self.truth, self.judge = truth, judge
        self.candidates: list[_Candidate] = []

    def add(self, label: str, kind: str, begin: Begin) -> None:
        """Judge a candidate and prepare its timed call; note why if it fails."""
        made = _Candidate(label, kind, self.flops, self.request.product_dtype)
        self.candidates.append(made)
        try:
            if self.truth is not None and kind != "floor":  # a floor has no results to judge
                self._judge(made, begin(True))
            running = begin(False)
            made.flops = self.flops if running.flops is None else running.flops
            made.dtype = running.dtype or made.dtype
            made.call = running.timed or running.call
        except Exception as failure:  # a peer may raise anything; a failure of ours exits with 1
            made.note = reason(failure)

    def _judge(self, made: _Candidate, running: Running) -> None:
        outputs = running.outputs(running.call())
        if running.same and self.truth is not None:
            made.error = relative_error(outputs, self.truth)
        if self.judge is not None and "result" in outputs:
            made.verdict = self.judge(outputs["result"])


def _prepare_op(case: Case, request: Request) -> _Prepared:
    """Prepare the candidates of an op, ours first."""
    extra = keywords(case, request)
    small = case.calls(request.workload.distinct(), request.inputs, **extra)
    timed = case.calls(request.workload, request.inputs, **extra)
    truth, judge = None, None
    if request.refcheck:
        oracle = candidates.start_reference(case, [doubled(a) for a in small])
        truth = oracle.outputs(oracle.call())
        judge = PolarJudge(small[0]["X"]) if case.polar else None
    flops, traffic = sum(case.flops(a) for a in timed), candidates.bytes_moved(case, timed)
    prepared = _Prepared(request, flops, traffic, truth, judge)
    probe = candidates.start_ours(case, [copied(a) for a in small])
    label = candidates.served_by(probe.call)
    ours = Peer(label, "ours", candidates.start_ours)
    for peer in (ours, *peers(case, timed)):
        if peer is not ours and (not peer.wanted(request.kinds) or peer.label == label):
            continue

        def begin(judged: bool, peer: Peer = peer) -> Running:
            # Timed candidates share inputs: repeated calls keep every state in range.
            return peer.start(case, [copied(a) for a in small] if judged else timed)

        prepared.add(peer.label, peer.kind, begin)
    return prepared


def _prepare_step(step: Step, request: Request) -> _Prepared:
    """Prepare the candidates of an optimizer step, ours first."""
    small = steps.Model(request.workload.distinct(), request.inputs)
    model = steps.Model(request.workload, request.inputs)
    flops, traffic = sum(step.flops(w) for w in model.params), steps.bytes_moved(step, model)
    truth = steps.truth(step, small) if request.refcheck else None
    prepared = _Prepared(request, flops, traffic, truth)
    label = steps.label(step, small, request.precision)
    for entrant in steps.entrants(step, label, request.precision):
        if entrant.kind == "ours" or entrant.wanted(request.kinds):

            def begin(judged: bool, start: steps.Start = entrant.start) -> Running:
                return start(small if judged else model)

            prepared.add(entrant.label, entrant.kind, begin)
    return prepared


def _prepare_item(item: Item, request: Request) -> _Prepared:
    """Prepare a public item and its formula in plain torch, for all shapes of the workload."""
    made = [item.arguments(shape, request.inputs) for shape in request.workload.shapes]

    def begun(f: Callable[..., Any]) -> Begin:
        def call() -> list[Any]:
            return [f(**arguments) for arguments in made]

        return lambda _: Running(call, lambda results: {"result": list(flat(results))})

    truth = None
    if request.refcheck:
        doubled_up = [{k: wide(v) for k, v in arguments.items()} for arguments in made]
        truth = {"result": list(flat([item.formula(**arguments) for arguments in doubled_up]))}
    prepared = _Prepared(request, 0.0, 0.0, truth)
    prepared.add("orthonorm", "ours", begun(item.of(request.name)))
    if "torch" in request.kinds:
        prepared.add("formula", "torch", begun(item.formula))
    return prepared


def measure(request: Request) -> list[Record]:
    """Measure a request; return a record of every candidate, ours first."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.threads or before)
    try:
        if request.name in CASES:
            prepared = _prepare_op(CASES[request.name], request)
        elif request.name in ITEMS:
            prepared = _prepare_item(ITEMS[request.name], request)
        else:
            prepared = _prepare_step(STEPS[request.name], request)
        samples = _sample(prepared)
        return [_record(prepared, samples, made) for made in prepared.candidates]
    finally:
        torch.set_num_threads(before)


def _sample(prepared: _Prepared) -> dict[str, list[float]]:
    """Call every candidate once to warm up, then time in rounds those that did not fail."""
    for made in prepared.candidates:
        if made.call is not None:
            try:
                made.call()
            except Exception as failure:  # as in _Prepared.add
                made.call, made.note = None, reason(failure)
    calls = {c.label: c.call for c in prepared.candidates if c.call is not None}
    return interleave(calls, prepared.request.plan, prepared.request.device, warm=True)


def _apart(request: Request, made: _Candidate) -> dict[str, Any]:
    """Measure the figures that are not taken in rounds: cold, graph and host times, memory."""
    found: dict[str, Any] = {}
    if made.call is None or made.kind == "floor":
        return found
    on_gpu = request.device.startswith("cuda")
    if on_gpu or request.memory:
        extra = peak_extra_memory(made.call, request.device)
        found["extra_mib"] = extra / 2**20
    if on_gpu:
        found["cold_ms"] = cuda.cold(made.call, request.device) * 1e3
        found["host_us"] = cuda.host(made.call) * 1e6
        try:
            found["graph_ms"] = cuda.replayed(made.call) * 1e3
        except RuntimeError as failure:
            found["note"] = f"no CUDA graph, {reason(failure)}"
    return found


def _record(
    prepared: _Prepared, samples: Mapping[str, Sequence[float]], made: _Candidate
) -> Record:
    """Make the record of a candidate from its samples and verdicts."""
    request, times = prepared.request, samples.get(made.label)
    found: dict[str, Any] = {"note": made.note, **_apart(request, made)}
    if times:
        s = stats(times)
        found |= dict(median_ms=s.median * 1e3, p10_ms=s.p10 * 1e3, p90_ms=s.p90 * 1e3,
                      rounds=s.rounds, drift=s.drift)  # fmt: skip
        base = samples.get(prepared.candidates[0].label)
        if base and made.flops == prepared.flops:  # with another amount of work only rates compare
            found |= dict(ratio=ratio_of_medians(times, base),
                          round_ratio=median_ratio(times, base))  # fmt: skip
        traffic = prepared.traffic if made.flops == prepared.flops else 0.0
        ceiling, seconds = ceilings.allowed(made.flops, traffic, made.dtype, request.limits)
        found |= dict(flops=made.flops, bytes=traffic, ceiling=ceiling,
                      of_ceiling=seconds / s.median if ceiling else None)  # fmt: skip
    if made.verdict is not None:
        found |= made.verdict._asdict()
    return Record(
        name=request.name, shape=request.workload.name, dtype=request.dtype,
        spectrum=request.spectrum, precision=request.precision or "", sweep=request.sweep,
        threads=request.threads, backend=made.label, kind=made.kind, error=made.error,
        command=request.command, **found,
    )  # fmt: skip
