"""Param groups: their rules, and the checks of their keys and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks as check
from .settings import ADAMW_DEFAULTS, COMMON, DECAYS, RULES, TORCH, Rule, inherited
from .storage import SMALLER
from .tensors import check_placements, is_distributed, meets_owner
from .views import VIEW_DEFAULTS, check_views, cuts_stacks

# Keys of a group that are no settings: torch and its schedulers add them; steps count in the last.
FOREIGN = ("params", "param_names", "initial_lr", "name", "skipped", "rounding_seed")


class Groups(torch.optim.Optimizer):
    """A torch.optim.Optimizer with checked groups, each with rule="matrix" or rule="adamw"."""

    companion: ClassVar[dict[str, Any]] = {}
    rules: ClassVar[dict[str, Rule]] = {}
    decays: ClassVar[tuple[str, ...]] = DECAYS
    min_dim: ClassVar[int] = 2
    self_contained: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = False
    mantissas: ClassVar[bool] = True  # False if the rule writes weights itself, not through base
    _asked: frozenset[str] = frozenset()  # torch.optim keywords that were given as true
    company: Any = None  # the ranks that share its work (distributed.company)
    met: Any = False  # True once ranks have compared what they hold (distributed.meeting)

    def __init__(
        self,
        params: Any,
        settings: dict[str, Any],
        common: Mapping[str, Any],
        shared: Iterable[str] = (),
    ) -> None:
        """Take the rule's own `settings` and the `common` ones of every optimizer.

        `common` has keys of settings.Common. Groups with rule="adamw" take the settings named in
        `shared` from the rule.
        """
        self._settled: dict[int, list[Any] | None] = {}  # id of a group -> values checked last
        if not isinstance(params, Iterable):
            raise TypeError(
                f"{self.name}: params must be parameters, named parameters or param groups, "
                f"got {type(params).__name__}"
            )
        common, self._asked = self._without_torchs(common)
        if unknown := set(common) - set(COMMON) - set(settings) - {"adamw"}:
            raise TypeError(f"{self.name}: got unexpected keyword arguments {sorted(unknown)}")
        adamw = common.get("adamw")
        if not isinstance(adamw, (Mapping, type(None))):
            raise TypeError(f"{self.name}: adamw must be a dict, got {type(adamw).__name__}")
        settings = {"rule": "matrix", **COMMON, **settings, **common}
        settings.pop("adamw", None)
        taken = {key: settings[key] for key in shared}
        self._adamw = {**ADAMW_DEFAULTS, **self.companion, **inherited(settings), **taken}
        self._adamw.update(adamw or {})
        if unknown := set(self._adamw) - set(ADAMW_DEFAULTS):
            raise ValueError(
                f"{self.name}: adamw must only have the keys {sorted(ADAMW_DEFAULTS)}, "
                f"got {sorted(unknown)}"
            )
        self._check_settings({"rule": "adamw", **self._adamw})
        super().__init__(params, settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_asked": self._asked, "_adamw": self._adamw}

    @property
    def name(self) -> str:
        return type(self).__name__

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError or TypeError for settings that are wrong together; `rules` check one."""

    def finish(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Do what follows the update of a group's matrices: by default nothing."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may set its `rule` and any hyperparameter of that rule."""
        if not isinstance(param_group, dict):
            raise TypeError(f"{self.name}: a param group must be a dict, got {type(param_group)}")
        if "params" not in param_group:
            raise ValueError(f"{self.name}: a group must have params, got {sorted(param_group)}")
        group, asked = self._without_torchs(param_group)
        known = self.group_defaults(group)
        if unknown := set(group) - set(known) - set(FOREIGN):
            raise ValueError(
                f"{self.name}: a group with rule={group.get('rule', 'matrix')!r} takes the keys "
                f"{sorted(known)}, got {sorted(unknown)}"
            )
        for key, value in known.items():
            group[key] = check.plain(group.get(key, value))
        super().add_param_group(self._named(group))
        added = self.param_groups[-1]
        try:
            for key in set(self.defaults) - set(known):
                added.pop(key, None)
            self._check_settings(added)
            self._check_group_params(added)
            seeded(added)
            if "fused" in asked - self._asked:
                raise ValueError(
                    f"{self.name}: fused must be given to the optimizer, not to a group"
                )
            if "capturable" in asked | self._asked and (reason := self._host_decides(added)):
                raise ValueError(f"{self.name}: capturable must be False here: {reason}")
        except Exception:
            self.param_groups.pop()
            raise
        self.met = False

    def _named(self, group: dict[str, Any]) -> dict[str, Any]:
        """Name the parameters of a group by their numbers, if they have no names and others do."""
        if not (self.param_groups and "param_names" in self.param_groups[0]):
            return group
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        first = sum(len(g["params"]) for g in self.param_groups)
        if all(isinstance(p, Tensor) for p in params):
            params = [(f"added.{first + i}", p) for i, p in enumerate(params)]
        return {**group, "params": params}

    def _without_torchs(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
        """Check and remove torch.optim keywords; return (other keywords, those given as true)."""
        for key in given.keys() & TORCH.keys():
            TORCH[key](self.name, key, given[key])
        if given.get("differentiable"):
            raise ValueError(f"{self.name}: differentiable must be False: steps have no gradient")
        left = {key: value for key, value in given.items() if key not in TORCH}
        return left, frozenset(key for key in given.keys() & TORCH.keys() if given[key])

    def _host_decides(self, group: Mapping[str, Any]) -> str:
        """Return why a step of the group needs a decision of the host, or ""."""
        reasons = {
            "its rule counts steps on the host": group["rule"] == "matrix" and self.counts_steps,
            "nonfinite other than 'propagate' reads norms": group["nonfinite"] != "propagate",
            "telemetry is asked for by the host": bool(group["telemetry"]),
            "stochastic rounding counts steps on the host": bool(group["stochastic_rounding"]),
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True if GradScaler leaves its scale and `found_inf` to the step (the name is torch's).

        `fused=True` asks for it; the step then reads both on the device. Otherwise the scaler
        unscales the gradients and reads `found_inf` on the host before it calls the step. It does
        so too, whatever `fused` is, in each of these cases: the host must decide (`_host_decides`);
        the rule reads gradients besides its updates; a constraint or `finish` follows the update;
        state is smaller than float32 (`state_dtype`), but for AdamW's in 8 bits; parameters are
        sharded.
        """
        return "fused" in self._asked and all(map(self._reads_flags, self.param_groups))

    def _reads_flags(self, group: Mapping[str, Any]) -> bool:
        coded = group["rule"] == "adamw" and group["state_dtype"] == "8bit"  # by one op
        if (
            self._host_decides(group)
            or (group["state_dtype"] in SMALLER and not coded)
            or any(map(is_distributed, group["params"]))
        ):
            return False
        plain = self.self_contained and type(self).finish is Groups.finish
        return group["rule"] == "adamw" or (plain and group["constraint"] is None)

    def group_defaults(self, group: Mapping[str, Any]) -> dict[str, Any]:
        rule = group.get("rule", self.defaults["rule"])
        check.choice(self.name, "rule", rule, ("matrix", "adamw"))
        if rule == "adamw":
            return {"rule": "adamw", **self._adamw}
        return self.defaults

    def _check_changed_settings(self, group: dict[str, Any]) -> None:
        """Check hyperparameters before a step, unless all are the objects that were checked last.

        A list can change and stay the same object, so groups that hold lists are always checked.
        """
        last = None if torch.compiler.is_compiling() else self._settled.get(id(group))
        if last is not None and len(last) == len(group) and all(map(is_, last, group.values())):
            return
        self._check_settings(group)
        names = ("params", "param_names")
        lists = any(isinstance(v, list) for k, v in group.items() if k not in names)
        if not torch.compiler.is_compiling():
            self._settled[id(group)] = None if lists else [*group.values()]

    def _check_settings(self, group: Mapping[str, Any]) -> None:
        """Check the hyperparameters of a group, each alone and together."""
        check.choice(self.name, "rule", group["rule"], ("matrix", "adamw"))
        for key, value in group.items():
            if rule := self.rules.get(key) or RULES.get(key):
                rule(self.name, key, value)
        if group["stochastic_rounding"]:
            self._check_rounding(group)
        if group["state_dtype"] in SMALLER and group.get("mantissa"):
            raise ValueError(
                f"{self.name}: state_dtype must be None or 'float32' with mantissa=True, "
                f"got {group['state_dtype']!r}"
            )
        if group["rule"] == "matrix":
            check.choice(self.name, "decay", group["decay"], self.decays)
            if group["mantissa"] and not self.mantissas:
                raise ValueError(f"{self.name}: mantissa must be False, its step keeps none")
            if group["mantissa"] and group["constraint"] is not None:
                raise ValueError(f"{self.name}: constraint must be None with mantissa=True")
            self.check_group(group)
            if any(group[key] != default for key, default in VIEW_DEFAULTS.items()):
                self._check_views(group)

    def _check_rounding(self, group: Mapping[str, Any]) -> None:
        """Check a group that asks for stochastic rounding: there must be something to round."""
        if group.get("mantissa"):
            raise ValueError(
                f"{self.name}: stochastic_rounding must be False with mantissa=True, which keeps "
                "what rounding would lose"
            )
        own = group["rule"] == "matrix" and not self.mantissas
        if own and group["state_dtype"] != "bfloat16":
            raise ValueError(
                f"{self.name}: stochastic_rounding must be False unless state_dtype is 'bfloat16', "
                f"its step rounds weights to nearest, got state_dtype={group['state_dtype']!r}"
            )
        params = group.get("params", ())
        check.seed(self.name, "rounding_seed", group.get("rounding_seed"), params)

    def _check_group_params(self, group: Mapping[str, Any]) -> None:
        params = group["params"]
        check.same_device(self.name, params=params)
        if len({id(p) for p in params}) < len(params):
            raise ValueError(f"{self.name}: a group must have each parameter once, got one twice")
        self._check_params(group, range(len(params)))
        self.check_shardings(group)

    def _check_params(self, group: Mapping[str, Any], indices: Iterable[int]) -> None:
        for i in indices:
            p, label = group["params"][i], f"{self.name}: parameter {self.label(group, i)}"
            if p.dtype not in check.FLOATS or p.layout != torch.strided:
                raise ValueError(
                    f"{label} must be dense float32, float64, bfloat16 or float16, "
                    f"got {p.dtype}, {p.layout}"
                )
            check.not_expanded(label, p)
            if group["rule"] == "matrix":
                check_views(label, p.shape, group, self.min_dim)

    def check_shardings(self, group: Mapping[str, Any]) -> None:
        """Check the DTensors of a group, also before they get state: accelerate swaps them in."""
        for i, p in enumerate(group["params"]):
            if not is_distributed(p):
                continue
            refused = [("state_dtype", "None or 'float32'", group["state_dtype"] in SMALLER)]
            if group["rule"] == "matrix":
                refused += [("mantissa", "False", group["mantissa"])]
            for key, needed, holds in refused:
                if holds:
                    raise ValueError(
                        f"{self.name}: {key} must be {needed} for sharded parameters, "
                        f"got {group[key]!r} for parameter {self.label(group, i)}"
                    )
            cut = group["rule"] == "matrix" and meets_owner(p, group)
            if cut and cuts_stacks(p.shape, group):
                raise ValueError(
                    f"{self.name}: split and heads of a stack must be None where ranks cut its "
                    f"matrices, got {tuple(p.placements)} for parameter {self.label(group, i)}"
                )
            check_placements(f"{self.name}: parameter {self.label(group, i)}", p, cut)

    def _with_gradients(self, group: dict[str, Any]) -> list[int]:
        indices, strided = [], torch.strided
        for i, p in enumerate(group["params"]):
            g = p.grad
            if g is None or p.numel() == 0:
                continue
            indices.append(i)
            if type(g) not in check.PLAIN and is_distributed(g) and g.placements != p.placements:
                raise ValueError(
                    f"{self.name}: a gradient must be placed as its parameter, "
                    f"{p.placements}, got {g.placements} for parameter {self.label(group, i)}"
                )
            if g.layout is not strided or g.dtype not in check.FLOATS:
                raise ValueError(
                    f"{self.name}: gradients must be dense and real, got {g.layout}, {g.dtype} "
                    f"for parameter {self.label(group, i)}"
                )
        return indices

    def _check_views(self, group: Mapping[str, Any]) -> None:
        for i, p in enumerate(group["params"]):
            label = f"{self.name}: parameter {self.label(group, i)}"
            check_views(label, p.shape, group, self.min_dim)

    def label(self, group: Mapping[str, Any], index: int) -> str:
        """Return a parameter's name, or its index and shape, for messages."""
        names = group.get("param_names")
        return (
            repr(names[index])
            if names
            else f"{index} of shape {tuple(group['params'][index].shape)}"
        )


def seeded(group: dict[str, Any]) -> None:
    """Give a group that rounds stochastically a seed of its own, which counts steps."""
    if group["stochastic_rounding"]:
        seed, zero = group.get("rounding_seed"), torch.zeros((), dtype=torch.int64)
        group["rounding_seed"] = zero if seed is None else seed.clone()
