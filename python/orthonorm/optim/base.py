"""The one step loop: groups, state, non-finite gradients, and the AdamW companion.

An optimizer is a subclass that says which state tensors a parameter has and how a list of matrices
is updated (`update`); see muon.py for a whole one. Each param group picks its rule:
`rule="matrix"` (the subclass's own) or `rule="adamw"` (for embeddings, heads, gains, biases).
"""

from __future__ import annotations

import math
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


class Batch(NamedTuple):
    """What an update sees: parallel lists over the matrices of a group."""

    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    owners: list[Tensor]  # the parameter each matrix is a view of


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of every optimizer here. Subclasses set:

    elementwise_state: names of zero-initialized tensors of the parameter's shape.
    companion: overrides of ADAMW_DEFAULTS for groups with rule="adamw".
    `matrix_state(x, group)`: further tensors for one matrix (default none).
    `update(batch, group)`: the rule, on matrix views of parameters, gradients and state.
    `check_group(group)`: raise ValueError for hyperparameters out of range.
    """

    elementwise_state: ClassVar[tuple[str, ...]] = ()
    companion: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REGISTRY[cls.__name__] = cls

    def __init__(
        self, params: Any, defaults: dict[str, Any], adamw: Mapping[str, Any] | None = None
    ) -> None:
        """`adamw` overrides the companion's settings, for every group with rule="adamw"."""
        self._scalars: dict[tuple[int, str], Tensor] = {}
        self._adamw = {**ADAMW_DEFAULTS, **self.companion, **(adamw or {})}
        unknown = set(self._adamw) - set(ADAMW_DEFAULTS)
        if unknown:
            raise ValueError(
                f"{self.name}: adamw must only have the keys {sorted(ADAMW_DEFAULTS)}, "
                f"got {sorted(unknown)}"
            )
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
            self._check(added)
        except Exception:
            self.param_groups.pop()
            raise

    def _group_defaults(self, group: Mapping[str, Any]) -> dict[str, Any]:
        rule = group.get("rule", self.defaults["rule"])
        check.choice(self.name, "rule", rule, ("matrix", "adamw"))
        if rule == "adamw":
            return {"rule": "adamw", **self._adamw}
        return self.defaults

    def _check(self, group: dict[str, Any]) -> None:
        check.number(self.name, "lr", group["lr"], 0.0, 1e30)
        check.number(self.name, "weight_decay", group["weight_decay"], 0.0, 1e30)
        check.choice(self.name, "nonfinite", group["nonfinite"], NONFINITE)
        for i, p in enumerate(group["params"]):
            label = f"{self.name}: parameter {self._label(group, i)}"
            if p.dtype not in check.FLOATS or p.layout != torch.strided:
                raise ValueError(
                    f"{label} must be dense float32, float64, bfloat16 or float16, "
                    f"got {p.dtype}, {p.layout}"
                )
            if group["rule"] == "matrix":
                check_views(label, p.shape, group)
        if group["rule"] == "adamw":
            check_betas(self.name, group)
        else:
            self.check_group(group)

    def _label(self, group: Mapping[str, Any], index: int) -> str:
        names = group.get("param_names")
        return (
            repr(names[index])
            if names
            else f"{index} of shape {tuple(group['params'][index].shape)}"
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for hyperparameters of a matrix group out of range."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill what a foreign or older state dict lacks (torch.optim.Muon's has no rule)."""
        super().__setstate__(state)
        self.__dict__.setdefault("_adamw", {**ADAMW_DEFAULTS, **self.companion})
        self._scalars = {}
        for group in self.param_groups:
            for key, value in self._group_defaults(group).items():
                group.setdefault(key, value)

    # ---- the step -----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Gradients are read, never written.

        All gradients are checked before anything is written: an error leaves parameters and state
        as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, self._with_gradients(group)) for group in self.param_groups]
        work = [(group, self._finite(group, indices)) for group, indices in work]
        updated: list[Tensor] = []
        for group, indices in work:
            params = [group["params"][i] for i in indices]
            if params:
                if group["rule"] == "adamw":
                    self._adamw_update(params, group)
                else:
                    self.update(self._batch(params, group), group)
                updated += params
        if updated:
            torch.autograd.graph.increment_version(updated)
        return loss

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        """Update matrices and state in place; the only method most optimizers write."""
        raise NotImplementedError(f"{self.name} has no matrix rule")

    def _with_gradients(self, group: dict[str, Any]) -> list[int]:
        params = group["params"]
        indices = [i for i, p in enumerate(params) if p.grad is not None and p.numel() > 0]
        for i in indices:
            g = group["params"][i].grad
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
        if bad:
            group["skipped"] = group.get("skipped", 0) + len(bad)
        return [i for i in indices if i not in set(bad)]

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
        """group[key] as a 0-d float64 tensor on `device`, the same tensor at every step."""
        value = group[key]
        if isinstance(value, Tensor):
            return value.detach().to(device).reshape(())
        slot = (id(group), f"{key}@{device}")
        if slot not in self._scalars:
            self._scalars[slot] = torch.empty((), dtype=torch.float64, device=device)
        return self._scalars[slot].fill_(value)


def check_betas(name: str, group: Mapping[str, Any]) -> None:
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name}: betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check.fraction(name, f"betas[{i}]", beta)
    check.number(name, "eps", group["eps"], 0.0, math.inf)


def names_of(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """The parameter names recorded in param groups, in order ("" where none were given)."""
    return [
        name for group in groups for name in group.get("param_names") or [""] * len(group["params"])
    ]
