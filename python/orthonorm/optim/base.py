"""The one step loop: groups, state, non-finite gradients, and the AdamW companion.

An optimizer is a subclass that says which state tensors a parameter has and how a list of matrices
is updated (`update`); see muon.py for a whole one. Each param group picks its rule:
`rule="matrix"` (the subclass's own) or `rule="adamw"` (for embeddings, heads, gains, biases).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import adamw_step_, magnitude
from .views import VIEW_DEFAULTS, check_views, matrices

REGISTRY: dict[str, type[MatrixOptimizer]] = {}
NONFINITE = ("propagate", "skip", "error")
ADAMW_DEFAULTS: dict[str, Any] = {
    "lr": 3e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decay_first": True,  # decay the old weight (torch), not the updated one (Conda)
    "correct_eps": True,  # eps meets the bias-corrected root (torch), not the raw one (Conda)
    "nonfinite": "propagate",
}
ADAMW_STATE = ("exp_avg", "exp_avg_sq")


class Batch(NamedTuple):
    """What an update sees: parallel lists over the matrices of a group."""

    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    owners: list[Tensor]  # the parameter each matrix is a view of
    prepared: Any = None  # what `prepare` returned


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of every optimizer here. Subclasses set:

    elementwise_state: names of zero-initialized tensors of the parameter's shape.
    companion: overrides of ADAMW_DEFAULTS for groups with rule="adamw".
    `matrix_state(x, group)`: further tensors for one matrix (default none).
    `update(batch, group)`: the rule, on matrix views of parameters, gradients and state.
    `prepare(batch, group)`: what may fail on the way (default nothing), before anything is written.
    `check_group(group)`: raise ValueError for hyperparameters out of range.
    """

    elementwise_state: ClassVar[tuple[str, ...]] = ()
    companion: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REGISTRY[cls.__name__] = cls

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        adamw: Mapping[str, Any] | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        """For groups with rule="adamw": `shared` settings of both rules, overridden by `adamw`."""
        self._ones: dict[torch.device, Tensor] = {}
        self._seen: dict[Tensor, dict[str, weakref.ref[Tensor]]] = {}
        if not isinstance(params, Iterable):
            raise TypeError(
                f"{self.name}: params must be parameters, named parameters or param groups, "
                f"got {type(params).__name__}"
            )
        if not isinstance(adamw, (Mapping, type(None))):
            raise TypeError(f"{self.name}: adamw must be a dict, got {type(adamw).__name__}")
        self._adamw = {**ADAMW_DEFAULTS, **self.companion, **(shared or {}), **(adamw or {})}
        unknown = set(self._adamw) - set(ADAMW_DEFAULTS)
        if unknown:
            raise ValueError(
                f"{self.name}: adamw must only have the keys {sorted(ADAMW_DEFAULTS)}, "
                f"got {sorted(unknown)}"
            )
        self._check_settings({"rule": "adamw", **self._adamw})
        defaults = {"rule": "matrix", "nonfinite": "propagate", **VIEW_DEFAULTS, **defaults}
        super().__init__(params, defaults)

    @property
    def name(self) -> str:
        return type(self).__name__

    # ---- groups -------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may name its `rule`, and any hyperparameter of that rule."""
        if not isinstance(param_group, dict):
            raise TypeError(f"{self.name}: a param group must be a dict, got {type(param_group)}")
        if "params" not in param_group:
            raise ValueError(f"{self.name}: a group must have params, got {sorted(param_group)}")
        group = dict(param_group)
        known = self._group_defaults(group)
        unknown = set(group) - set(known) - {"params", "param_names", "initial_lr", "name"}
        if unknown:
            raise ValueError(
                f"{self.name}: a group with rule={group.get('rule', 'matrix')!r} takes the keys "
                f"{sorted(known)}, got {sorted(unknown)}"
            )
        for key, value in known.items():
            group.setdefault(key, value)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            for key in set(self.defaults) - set(known):
                added.pop(key, None)
            self._check_settings(added)
            self._check_params(added)
        except Exception:
            self.param_groups.pop()
            raise

    def _group_defaults(self, group: Mapping[str, Any]) -> dict[str, Any]:
        rule = group.get("rule", self.defaults["rule"])
        check.choice(self.name, "rule", rule, ("matrix", "adamw"))
        if rule == "adamw":
            return {"rule": "adamw", **self._adamw}
        return self.defaults

    def _check_settings(self, group: Mapping[str, Any]) -> None:
        """The hyperparameters: at construction and, as schedules change them, before every step."""
        check.choice(self.name, "rule", group["rule"], ("matrix", "adamw"))
        check.scheduled(self.name, "lr", group["lr"], 0.0, 1e30)
        check.number(self.name, "weight_decay", group["weight_decay"], 0.0, 1e30)
        check.choice(self.name, "nonfinite", group["nonfinite"], NONFINITE)
        if group["rule"] == "adamw":
            check_betas(self.name, group)
            for key in ("decay_first", "correct_eps"):
                check.choice(self.name, key, group[key], (True, False))
        else:
            self.check_group(group)
            if any(group[key] is not None for key in VIEW_DEFAULTS):
                self._check_views(group)

    def _check_params(self, group: Mapping[str, Any]) -> None:
        params = group["params"]
        check.same_device(self.name, params=params)
        if len({id(p) for p in params}) < len(params):
            raise ValueError(f"{self.name}: a group must have each parameter once, got one twice")
        for i, p in enumerate(params):
            label = f"{self.name}: parameter {self._label(group, i)}"
            if p.dtype not in check.FLOATS or p.layout != torch.strided:
                raise ValueError(
                    f"{label} must be dense float32, float64, bfloat16 or float16, "
                    f"got {p.dtype}, {p.layout}"
                )
            if any(n > 1 and stride == 0 for n, stride in zip(p.shape, p.stride(), strict=True)):
                raise ValueError(f"{label} must not be expanded, got strides {p.stride()}")
        if group["rule"] == "matrix":
            self._check_views(group)

    def _check_views(self, group: Mapping[str, Any]) -> None:
        for i, p in enumerate(group["params"]):
            check_views(f"{self.name}: parameter {self._label(group, i)}", p.shape, group)

    def _label(self, group: Mapping[str, Any], index: int) -> str:
        names = group.get("param_names")
        return (
            repr(names[index])
            if names
            else f"{index} of shape {tuple(group['params'][index].shape)}"
        )

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError or TypeError for hyperparameters of a matrix group out of range."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill what a foreign or older state dict lacks (torch.optim.Muon's has no rule).

        load_state_dict and unpickling end here: what does not fit leaves everything as it was.
        """
        before = dict(self.__dict__)
        super().__setstate__(state)
        self.__dict__.setdefault("_adamw", {**ADAMW_DEFAULTS, **self.companion})
        self._ones, self._seen = {}, {}
        try:
            for group in self.param_groups:
                for key, value in self._group_defaults(group).items():
                    group.setdefault(key, value)
                self._check_settings(group)
                self._check_params(group)
                for i in range(len(group["params"])):
                    self._check_state(group, i)
        except Exception:
            self.__dict__ = before
            raise

    def _check_state(self, group: dict[str, Any], index: int) -> None:
        """State, where there is one, is complete, dense and of the shapes it was made with."""
        p = group["params"][index]
        state, wanted = self.state.get(p, {}), self._state_shapes(p, group)
        label = f"{self.name}: parameter {self._label(group, index)}"
        missing = wanted.keys() - state.keys()
        if 0 < len(missing) < len(wanted):
            raise ValueError(f"{label}: state must have {sorted(wanted)}, got {sorted(state)}")
        for key in wanted.keys() & state.keys():
            check.tensor(label, f"state {key!r}", state[key])
            check.equal_shape(label, f"state {key!r}", state[key], wanted[key])
            check.same_device(label, parameter=[p], state=[state[key]])

    def _state_shapes(self, p: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        if group["rule"] == "adamw":
            return dict.fromkeys(ADAMW_STATE, check.shape(p)) | {"step": ()}
        shapes = dict.fromkeys(self.elementwise_state, check.shape(p))
        pieces = matrices(p, p, group)
        for i, piece in enumerate(pieces):
            suffix = "" if len(pieces) == 1 else f".{i}"
            shapes |= {k + suffix: v for k, v in self.matrix_state(piece, group).items()}
        return shapes

    # ---- the step -----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Gradients are read, never written.

        Hyperparameters, gradients and state are checked before anything is written: an error leaves
        parameters and state as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_settings(group)
        work = [(group, self._with_gradients(group)) for group in self.param_groups]
        kept = [self._finite(group, indices) for group, indices in work]
        batches = self._batches(kept)
        updated: list[Tensor] = []
        for (group, indices), finite, batch in zip(work, kept, batches, strict=True):
            if len(finite) < len(indices):
                group["skipped"] = group.get("skipped", 0) + len(indices) - len(finite)
            params = [group["params"][i] for i in finite]
            if batch is not None:
                self.update(batch, group)
            elif params:
                self._adamw_update(params, group)
            updated += params
        if updated:
            torch.autograd.graph.increment_version(updated)
        return loss

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        """Update matrices and state in place; the only method most optimizers write."""
        raise NotImplementedError(f"{self.name} has no matrix rule")

    def prepare(self, batch: Batch, group: dict[str, Any]) -> Any:
        """What `update` finds in `batch.prepared`. It may raise, and writes nothing."""

    def _with_gradients(self, group: dict[str, Any]) -> list[int]:
        params = group["params"]
        indices = [i for i, p in enumerate(params) if p.grad is not None and p.numel() > 0]
        for i in indices:
            g = params[i].grad
            if g.layout != torch.strided or g.dtype not in check.FLOATS:
                raise ValueError(
                    f"{self.name}: gradients must be dense and real, got {g.layout}, {g.dtype} "
                    f"for parameter {self._label(group, i)}"
                )
        return indices

    def _finite(self, group: dict[str, Any], indices: list[int]) -> list[int]:
        """The parameters to update under the group's `nonfinite` rule."""
        if group["nonfinite"] == "propagate" or not indices:
            return indices
        grads = [group["params"][i].grad for i in indices]
        norms = magnitude.overload([g.reshape(1, 1, -1) for g in grads])
        finite = norms.isfinite().tolist()
        bad = [i for i, ok in zip(indices, finite, strict=True) if not ok]
        if bad and group["nonfinite"] == "error":
            raise ValueError(
                f"{self.name}: gradients must be finite (nonfinite='error'), got inf or nan for "
                f"parameter {self._label(group, bad[0])}"
                + (f" and {len(bad) - 1} more" * (len(bad) > 1))
            )
        return [i for i in indices if i not in set(bad)]

    def _batches(self, kept: list[list[int]]) -> list[Batch | None]:
        """What the matrix groups update; where anything fails, no state has been made."""
        made: list[Tensor] = []
        batches: list[Batch | None] = []
        try:
            for group, indices in zip(self.param_groups, kept, strict=True):
                made += self._without_state(group, indices)
                params = [group["params"][i] for i in indices]
                batch = self._batch(params, group) if params and group["rule"] == "matrix" else None
                batches.append(batch and batch._replace(prepared=self.prepare(batch, group)))
        except Exception:
            for p in made:
                self.state.pop(p, None)
            raise
        return batches

    def _without_state(self, group: dict[str, Any], indices: list[int]) -> list[Tensor]:
        """Parameters that have none; that of the others is checked if a tensor was replaced.

        `_check_state` at every step would cost more than some steps (148 parameters: 1.0 ms, so
        0.08 ms; 2026-11). A traced step is checked by its ops, before any of them runs.
        """
        found: list[Tensor] = []
        for i in () if torch.compiler.is_compiling() else indices:
            p = group["params"][i]
            state, seen = self.state.get(p), self._seen.get(p)
            if not state:
                found.append(p)
            elif not seen or any(state.get(k) is not ref() for k, ref in seen.items()):
                self._check_state(group, i)
                held = {k: t for k, t in state.items() if isinstance(t, Tensor)}
                self._seen[p] = {k: weakref.ref(t) for k, t in held.items()}
        return found

    def _batch(self, params: list[Tensor], group: dict[str, Any]) -> Batch:
        """Matrix views of parameters, gradients and state, with the state made where it is new."""
        batch = Batch([], [], {}, [])
        for p in params:
            state = self.state[p]
            for key in self.elementwise_state:
                if key not in state:
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
            pieces = matrices(p, p, group)
            batch.params.extend(pieces)
            batch.grads.extend(matrices(p.grad, p, group))  # type: ignore[arg-type]
            batch.owners.extend([p] * len(pieces))
            for key in self.elementwise_state:
                batch.state.setdefault(key, []).extend(matrices(state[key], p, group))
            for i, piece in enumerate(pieces):
                suffix = "" if len(pieces) == 1 else f".{i}"
                for key, shape in self.matrix_state(piece, group).items():
                    if key + suffix not in state:
                        state[key + suffix] = piece.new_zeros(shape)
                    batch.state.setdefault(key, []).append(state[key + suffix])
        return batch

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of further state tensors of one matrix (..., m, n)."""
        return {}

    def _adamw_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        (beta1, beta2), states = group["betas"], [self.state[p] for p in params]
        adamw_step_.overload(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
            self.scalar(group, "lr", params[0].device),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["decay_first"],
            group["correct_eps"],
        )

    def scalar(self, group: dict[str, Any], key: str, device: torch.device) -> Tensor:
        """group[key] as a 0-d tensor on `device`, float64 unless it is a tensor already.

        A product, not a fill: torch.compile turns it into arithmetic on a tensor, so that one graph
        serves all values of a number; `fill_` and `full` compiled one for each (torch 2.13).
        """
        value = group[key]
        if isinstance(value, Tensor):
            return value.detach().to(device).reshape(())
        if device not in self._ones:
            self._ones[device] = torch.ones((), dtype=torch.float64, device=device)
        return self._ones[device] * value


def check_betas(name: str, group: Mapping[str, Any]) -> None:
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name}: betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check.fraction(name, f"betas[{i}]", beta)
    check.number(name, "eps", group["eps"], 0.0)


def names_of(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """The parameter names recorded in param groups, in order ("" where none were given)."""
    return [
        name for group in groups for name in group.get("param_names") or [""] * len(group["params"])
    ]
