"""Optimizer steps as candidates: ours from orthonorm.optim, those of torch and packages, and an
eager Conda.

Every candidate has its own copy of the parameters and gradients. Its output is the update
W_after - W_before of one step from fresh state.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import orthonorm
import torch
from torch import Tensor

from . import packages
from .candidates import Running, Unavailable, kernels_of, served_by
from .cases import Step
from .inputs import Inputs
from .shapes import Workload


class Model:
    """Parameters and gradients of a workload, which candidates copy."""

    def __init__(self, workload: Workload, inputs: Inputs) -> None:
        named = [(f"[{i}]", shape) for i, shape in enumerate(workload.shapes)]
        self.params = [inputs.normal("params" + n, s).to(inputs.dtype) for n, s in named]
        self.grads = [inputs.matrix("grads" + n, s) for n, s in named]

    def parameters(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return new leaves with the same numbers and their gradients."""
        leaves = []
        for w, g in zip(self.params, self.grads, strict=True):
            leaf = w.to(g.device, dtype or w.dtype, copy=True).requires_grad_()
            leaf.grad = g.to(leaf.dtype, copy=True)  # a copy, because ScionLight scales it
            leaves.append(leaf)
        return leaves


Start = Callable[[Model], Running]
KERNELS, MUON = "its kernels alone", "torch.optim.Muon"


class Entrant(NamedTuple):
    """A candidate by its label, kind, start function and package, as `candidates.Peer`."""

    label: str
    kind: str
    start: Start
    package: str = ""

    def wanted(self, names: tuple[str, ...]) -> bool:
        """True if its kind or its package is among the names."""
        return self.kind in names or self.package in names


def _running(model: Model, params: list[Tensor], call: Callable[[], Any]) -> Running:
    """Return the Running of a step on `params`, whose output is their change."""

    def outputs(_: Any) -> dict[str, list[Tensor]]:
        pairs = zip(params, model.params, strict=True)
        return {"update": [w.detach().double() - before.double() for w, before in pairs]}

    return Running(call, outputs)


def _run(model: Model, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Running:
    """Start the step of an optimizer that `make` creates on a copy of the parameters."""
    params = model.parameters()
    return _running(model, params, make(params).step)


def _class(step: Step) -> Any:
    """Return our optimizer class of a step; raise Unavailable if there is none."""
    if importlib.util.find_spec("orthonorm.optim") is None:
        raise Unavailable("orthonorm.optim is not there yet")
    module = importlib.import_module("orthonorm.optim")
    if not hasattr(module, step.optimizer):
        raise Unavailable(f"orthonorm.optim has no {step.optimizer}")
    return getattr(module, step.optimizer)


def _ours(step: Step, precision: str | None, model: Model) -> Running:
    """Start our step."""
    extra = {} if precision is None else {"precision": precision}
    make = functools.partial(_class(step), **step.settings, **step.own, **extra)
    return _run(model, make)


def _kernels(step: Step, precision: str | None, model: Model) -> Running:
    """Start the kernel calls of our second step alone, without the rest of the step."""
    call = _ours(step, precision, model).call
    call()  # the first step makes the state and refreshes bases
    kernels = kernels_of(call)

    @torch.no_grad()
    def again() -> None:
        for kernel in kernels:
            kernel()

    return Running(again, same=False)


def label(step: Step, model: Model, precision: str | None) -> str:
    """Return the label of our step in tables: the backends that serve it."""
    try:
        return served_by(_ours(step, precision, model).call)
    except Unavailable:
        return f"orthonorm.optim.{step.optimizer}"


def truth(step: Step, model: Model) -> dict[str, list[Tensor]] | None:
    """Return the update of our step in float64 by the references alone; None if unavailable."""
    try:
        make = functools.partial(_class(step), **step.settings, **step.own)
    except Unavailable:
        return None
    params = model.parameters(torch.float64)
    running = _running(model, params, make(params).step)
    with orthonorm.reference():
        return running.outputs(running.call())


def _torch_muon(step: Step, compiled: bool, model: Model) -> Running:
    if any(w.dim() != 2 for w in model.params):
        raise Unavailable("torch.optim.Muon takes 2-D parameters only")
    running = _run(model, functools.partial(torch.optim.Muon, **step.settings))
    call = torch.compile(running.call) if compiled else running.call
    return running._replace(call=call, dtype="bfloat16")


def _package(step: Step, make: packages.Make, model: Model) -> Running:
    """Start an optimizer of a package; scales and eps differ, so its update is not compared."""
    made = functools.partial(make, s=dict(step.settings))
    return _run(model, made)._replace(same=False)


def _torch_adamw(step: Step, how: str, model: Model) -> Running:
    settings: dict[str, Any] = {**step.settings, how: True}
    return _run(model, functools.partial(torch.optim.AdamW, **settings))


class _EagerConda(torch.optim.Optimizer):
    """Conda as in its authors' code: an SVD of the momentum at the first step, then three products
    per step (arXiv:2509.24218)."""

    def __init__(self, params: list[Tensor], lr: float, betas: tuple[float, float], eps: float,
                 scale: float) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, scale=scale))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                state, right = self.state[w], w.shape[-2] >= w.shape[-1]
                if not state:
                    state.update(m=torch.zeros_like(w), v=torch.zeros_like(w), t=0)
                m, v = state["m"].mul_(beta1).add_(w.grad, alpha=1 - beta1), state["v"]
                if state["t"] == 0:
                    wide = m if m.dtype == torch.float64 else m.float()
                    U, _, Vh = torch.linalg.svd(wide, full_matrices=False)
                    state["q"] = (Vh.mT if right else U).to(w.dtype).contiguous()
                q = state["q"]
                state["t"] += 1
                g, direction = (w.grad @ q, m @ q) if right else (q.mT @ w.grad, q.mT @ m)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                normalized = direction / v.sqrt().add_(group["eps"])
                correction = (1 - beta2 ** state["t"]) ** 0.5 / (1 - beta1 ** state["t"])
                size = group["lr"] * correction * group["scale"]
                w.add_(normalized @ q.mT if right else q @ normalized, alpha=-size)


def _eager_conda(step: Step, model: Model) -> Running:
    settings = {**step.settings, "scale": step.own["scale"]}
    return _run(model, functools.partial(_EagerConda, **settings))


def entrants(step: Step, ours: str, precision: str | None) -> list[Entrant]:
    """Return our candidate, then those of torch and of other packages."""
    found = [Entrant(ours, "ours", functools.partial(_ours, step, precision))]
    if step.name == "muon":
        for kind, more in (("torch", ""), ("compiled", " compiled")):
            start = functools.partial(_torch_muon, step, kind == "compiled")
            found.append(Entrant(MUON + more, kind, start))
    elif step.name == "conda":
        found.append(
            Entrant("eager, three products", "torch", functools.partial(_eager_conda, step))
        )
    elif step.name == "adamw":
        for how in ("fused", "foreach"):
            start = functools.partial(_torch_adamw, step, how)
            found.append(Entrant(f"torch.optim.AdamW({how})", "torch", start))
    for name, package, kind, make in packages.STEPS.get(step.name, ()):
        found.append(Entrant(name, kind, functools.partial(_package, step, make), package))
    found.append(Entrant(KERNELS, "floor", functools.partial(_kernels, step, precision)))
    return found


def bytes_moved(step: Step, model: Model) -> float:
    """Return the bytes of a step: gradients read, parameters and states read and written."""
    return float(sum(w.numel() * w.element_size() for w in model.params) * (3 + 2 * step.states))
