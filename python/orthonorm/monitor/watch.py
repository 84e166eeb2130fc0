"""Monitor: spectral metrics of a model while it trains, by hooks, within a budget of time."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .. import _checks as check
from .. import ops
from ..ops.spectral import start_vector
from .alignment import AlignmentAlarm, spectral_alignment
from .guard import Guard, warn_of
from .metrics import METRICS, NORMS, Named, batches, check_rules, choose, known, serves, stack
from .parts import Parts
from .records import Records, Row, plot, write_csv, write_json
from .shards import gathered, on_any_rank
from .watched import find, weakly

KINDS = ("weights", "gradients", "updates", "activations")
POWER_STEPS = 16  # per measurement; they start from the last measurement's vectors


class Monitor:
    """Rows (step, kind, name, metric, value) of a model's matrices at steps with step % every = 0.

        monitor = Monitor(model, every=100)   # before training; the loop stays as it is
        ...
        monitor.to_csv("spectra.csv"); monitor.plot("plots"); monitor.close()

    It hooks into torch.optim.Optimizer.step, whichever optimizer holds the model's parameters, and
    into the model's nn.Linear layers for the forward pass of a measured step only. Weights,
    gradients and activations are those of the step; updates are the changes that step() makes.
    Loops without an optimizer, or with a compiled step, call `monitor.step()` after backward
    instead. There are no updates then, and no activations of compiled models.

    Matrices are the parameters of two and more dimensions: convolutions flattened to out x rest,
    other leading dimensions as stacks called name[i]. sigma_1 is a lower bound by 16 power steps
    that start where the last measurement ended. Activations are the inputs of nn.Linear layers, at
    most `tokens` of them. They also give "sign_diversity" and "mean_alignment" of
    `spectral_alignment`, and its alarm. Metrics that need the whole spectrum are measured for
    matrices whose short side is at most 256.

    Keep a reference to the monitor: when the last one is gone, its hooks are removed as by close().
    The hooks keep neither the monitor nor the model alive.

    It never stops training: failures are reported once by a MonitorWarning and counted in
    `failures`. If a measurement would take `seconds` beyond `budget` of the time since the first
    step, it is put off to the next multiple of `every` and counted in `put_off`. Memory: the rows
    kept, two vectors per matrix, `tokens` inputs per layer, and during a measured step() a copy of
    the weights for their updates. DTensors (as after `fully_shard`) are gathered on every rank,
    except for metrics that follow from sigma_1 and |X|_F, whose products are local.

    Args:
        model: the model whose parameters are watched.
        every: steps between measurements; the first is at step `every`.
        kinds: some of "weights", "gradients", "updates", "activations".
        include, exclude: shell patterns for parameter names ("*.attn.*").
        metrics: names of METRICS for all kinds, or {kind: names}; None: those without an SVD.
        tokens: most inputs of a layer that are measured, evenly spread.
        budget: share of the training time, or None for no limit.
        rules: {(kind, metric): f(name, value)}; f returns True for an alarm, one object per key.
            None: an `AlignmentAlarm` on ("activations", "sign_diversity").
        on_alarm: function that gets the Row of an alarm; None warns.
        keep: number of rows kept in memory.
        out: a .csv or .jsonl file that gets every row as it is measured.
        tensorboard: a folder for TensorBoard (where it is installed), or a SummaryWriter.

    Cost: 16 power steps and some passes over every matrix when it measures; at other steps, two
    hooks. docs/monitor.md has timings. Source: see each metric's docstring; the alarm is that of
    arXiv:2510.04202.

    Attributes: rows, alarms, failures (a Counter), put_off, steps, seconds (spent measuring).
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        kinds: Sequence[str] = KINDS,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        metrics: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        tokens: int = 256,
        budget: float | None = 0.01,
        rules: Mapping[tuple[str, str], Callable[[str, float], bool]] | None = None,
        on_alarm: Callable[[Row], Any] | None = None,
        keep: int = 100_000,
        out: str | Path | None = None,
        tensorboard: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"monitor: model must be an nn.Module, got {type(model).__name__}")
        for label, value in (("every", every), ("tokens", tokens), ("keep", keep)):
            check.integer("monitor", label, value, 1)
        if budget is not None:
            check.number("monitor", "budget", budget, 0.0, 1.0)
        for kind in kinds:
            check.choice("monitor", "kinds", kind, KINDS)
        self.model, self.every, self.kinds, self.tokens = model, every, tuple(kinds), tokens
        self.metrics, self.budget = choose(metrics), budget
        aligned = {("activations", "sign_diversity"): AlignmentAlarm()}
        self.rules = aligned if rules is None else check_rules(rules, self.metrics)
        self.on_alarm = on_alarm or warn_of
        self._parameters, self._layers, self._flat = find(model, include, exclude)
        self.alarms: list[Row] = []
        self._guard = Guard()
        self.failures = self._guard.failures
        self.steps = self.put_off = 0
        self.seconds = self._last_cost = 0.0
        self._started: float | None = None
        self._vectors: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._parts = Parts()
        self._inputs: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._layer_hooks: list[Any] = []
        self._measuring = self._armed = False
        self._measured: set[str] = set()  # names of parameters with rows of this step
        self._leader: Callable[[], Optimizer | None] = lambda: None
        self.records = Records(keep, out, None)
        with self._guard("tensorboard"):
            self.records = Records(keep, out, tensorboard)
        self._hooks = [
            register_optimizer_step_pre_hook(weakly(self._pre_step)),
            register_optimizer_step_post_hook(weakly(self._post_step)),
        ]
        self._arm()

    # Steps --------------------------------------------------------------------------------------

    def step(self) -> None:
        """Count a step, and measure it if it is due: for loops without a torch optimizer."""
        with self._guard("step"):
            self._begin()
            if self._measuring:
                self._measure_before(self._parameters, True)
            self._end()

    def _pre_step(self, optimizer: Optimizer, *_: Any) -> None:
        with self._guard("step"):
            if self._leader() is None and self._held(optimizer):
                self._leader = weakref.ref(optimizer)
            leads = self._leader() is optimizer
            if leads:
                self._begin()
            if self._measuring:
                held = {n: p for n, p in self._held(optimizer).items() if n not in self._measured}
                self._measured.update(held)
                if held:  # inputs kept when another optimizer steps may be the next step's
                    self._measure_before(held, leads)
                if "updates" in self.kinds:
                    self._before.update({n: p.detach().clone() for n, p in held.items()})

    def _post_step(self, optimizer: Optimizer, *_: Any) -> None:
        with self._guard("step"):
            held = [n for n in self._held(optimizer) if n in self._before] if self._before else []
            if held:
                with self._timed():
                    changes = {n: self._parameters[n].detach() - self._before.pop(n) for n in held}
                    self._measure_parameters("updates", changes)
            if self._leader() is optimizer:
                self._end()

    def _held(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the watched parameters that this optimizer updates."""
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self._parameters.items() if id(p) in ids}

    def _begin(self) -> None:
        self._started = self._started or time.perf_counter()
        self.steps += 1
        self._measuring = self._armed
        self._measured.clear()
        self._last_cost = 0.0 if self._measuring else self._last_cost

    def _end(self) -> None:
        self._disarm()
        self._arm()

    def _arm(self) -> None:
        """Prepare the next step, if it is to be measured and the budget allows."""
        if (self.steps + 1) % self.every:
            return
        elapsed = time.perf_counter() - (self._started or time.perf_counter())
        allowed = float("inf") if self.budget is None else self.budget * elapsed
        late = self._last_cost > 0 and self.seconds + self._last_cost > allowed
        if on_any_rank(late, self._parameters.values()):
            self.put_off += 1
            self._guard.report(
                "budget", f"put off: {self._last_cost:.3g} s are more than budget={self.budget:g} "
                f"allows after {elapsed:.3g} s",
            )  # fmt: skip
            return
        self._armed = True
        if "activations" in self.kinds:
            for name, module in self._layers.items():
                self._layer_hooks.append(module.register_forward_pre_hook(self._capture(name)))

    def _disarm(self) -> None:
        self._armed = False
        for hook in self._layer_hooks:
            hook.remove()
        self._layer_hooks.clear()
        self._inputs.clear()

    def _capture(self, name: str) -> Callable[..., None]:
        """Return a hook that keeps a sample of the layer's first input of the step."""
        return weakly(self._sample, name)

    def _sample(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if name in self._inputs or not torch.is_grad_enabled():
            return
        with self._guard(f"activations of {name}"):
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            self._inputs[name] = x[:: -(-len(x) // self.tokens)].clone()

    # Measurements -------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """True if the current step is measured."""
        return self._armed

    def observe(self, name: str, X: Tensor, kind: str = "caches") -> None:
        """Measure a tensor of the caller's, such as a KV cache, if this step is due.

        Args:
            name: its name in the rows.
            X: (..., m, n); leading dimensions are a stack called name[i].
            kind: its kind in the rows; "caches" has default metrics.
        """
        if not self._armed:
            return
        with self._guard(f"{kind} of {name}"), self._timed():
            self._measure(kind, stack(name, X.detach(), False), self.steps + 1)

    def _measure_before(self, parameters: Mapping[str, Tensor], inputs: bool) -> None:
        """Measure weights, gradients and, if wanted, the layers' inputs, before a step."""
        with self._timed():
            if "weights" in self.kinds:
                self._measure_parameters("weights", parameters)
            if "gradients" in self.kinds:
                grads = {n: p.grad for n, p in parameters.items() if p.grad is not None}
                self._measure_parameters("gradients", grads)
            if inputs and self._inputs:
                self._measure("activations", list(self._inputs.items()))
                self._align()
                self._inputs.clear()

    def _measure_parameters(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Add the rows of the kind's metrics; gather no matrix whose local parts give them all."""
        rows: list[Row] = []
        with self._guard(f"{kind} in parts"):
            metrics = self.metrics.get(kind, NORMS)
            for found in self._parts.measured(kind, tensors, metrics, POWER_STEPS):
                rows.append(Row(self.steps, kind, *found))
        self._record(rows)
        done = {row.name for row in rows}
        self._measure(kind, self._matrices({n: t for n, t in tensors.items() if n not in done}))

    def _matrices(self, tensors: Mapping[str, Tensor]) -> Named:
        out: Named = []
        for name, t in tensors.items():
            with self._guard(f"shape of {name}"):
                out += stack(name, gathered(t.detach()), id(self._parameters[name]) in self._flat)
        return out

    def _measure(self, kind: str, matrices: Named, step: int | None = None) -> None:
        """Add the rows of the kind's metrics for these matrices."""
        names = self.metrics.get(kind, NORMS)
        if not names or not matrices:
            return
        step, rows = step or self.steps, []
        tensors = [X for _, X in matrices]
        tops = self._tops(kind, matrices)
        for members in batches(tensors):
            with self._guard(f"{kind} of {matrices[members[0]][0]}"):
                batch = known([tensors[i] for i in members], [tops[i] for i in members], names)
                for metric in names:
                    if not serves(metric, batch.X):
                        continue
                    with self._guard(f"{metric} of {kind}"):
                        values = METRICS[metric].compute(batch).tolist()
                        rows += [
                            Row(step, kind, matrices[i][0], metric, value)
                            for i, value in zip(members, values, strict=True)
                        ]
        self._record(rows)

    def _record(self, rows: list[Row]) -> None:
        with self._guard("records"):
            self.records.add(rows)
        for row in rows:
            rule = self.rules.get((row.kind, row.metric))
            if rule is None:
                continue
            with self._guard(f"alarm on {row.metric} of {row.name}"):
                if rule(row.name, row.value):
                    self.alarms.append(row)
                    self.on_alarm(row)

    def _tops(self, kind: str, matrices: Named) -> list[Tensor]:
        """Return sigma_1 of all matrices, by one call that continues from the last vectors."""
        pairs = []
        for name, X in matrices:
            pair = self._vectors.get((kind, name))
            if pair is None or (len(pair[0]), len(pair[1])) != tuple(X.shape):
                pair = (start_vector(X.mT), start_vector(X))
            pairs.append(pair)
            self._vectors[kind, name] = pair
        u, v = ([pair[side] for pair in pairs] for side in (0, 1))
        return list(ops.power_iteration_([X for _, X in matrices], u, v, POWER_STEPS).unbind())

    def _align(self) -> None:
        """Measure the Spectral Alignment of inputs with v_1 of their layer's weight."""
        rows: list[Row] = []
        for name, X in self._inputs.items():
            W = self._layers[name]._parameters.get("weight")
            if W is None:  # computed by a parametrization
                continue
            with self._guard(f"alignment of {name}"):
                pair = self._vectors.get(("weights", f"{name}.weight".lstrip(".")))
                found = spectral_alignment(gathered(W), X, None if pair is None else pair[1])
                diversity = found.diversity.item()
                row = Row(self.steps, "activations", name, "sign_diversity", diversity)
                rows += [row, row._replace(metric="mean_alignment", value=found.mean.item())]
        self._record(rows)

    # Results ------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[Row]:
        """The last `keep` rows, a new list."""
        return list(self.records.rows)

    def series(self, metric: str, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of one metric of one matrix."""
        return self.records.series(metric, kind, name)

    def to_csv(self, path: str | Path) -> None:
        """Write the rows kept in memory as step,kind,name,metric,value."""
        write_csv(self.records.rows, path)

    def to_json(self, path: str | Path) -> None:
        """Write the rows kept in memory as a list of objects, with null for non-finite values."""
        write_json(self.records.rows, path)

    def plot(self, folder: str | Path) -> list[Path]:
        """Write a PNG per kind and metric, alarms marked; return their paths. Needs matplotlib."""
        return plot(self.records.rows, folder, self.alarms)

    def close(self) -> None:
        """Remove every hook; the rows stay."""
        with self._guard("step"):
            self._disarm()
        while self._hooks:
            self._hooks.pop().remove()

    def __del__(self) -> None:
        if self.__dict__.get("_hooks"):  # none if the constructor raised or close() was called
            if not self.steps and not sys.is_finalizing():
                self._guard.report("close", "ended before its first step: keep the object")
            self.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Timing -------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the time spent inside to `seconds`, after the device has finished earlier work."""
        device = next(iter(self._parameters.values())).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        try:
            with torch.no_grad():
                yield
        finally:
            spent = time.perf_counter() - started
            self.seconds += spent
            self._last_cost += spent
