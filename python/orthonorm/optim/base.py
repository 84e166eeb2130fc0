"""The one step loop: state, momentum, decay, constraints, non-finite gradients, and AdamW.

An optimizer is a subclass that defines its state and its direction; normuon.py is a full example.
Each param group picks its rule: `rule="matrix"` (the subclass's own) or `rule="adamw"` (for
embeddings, heads, gains, biases).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..distributed import agreement, shards
from ..distributed.company import owned_among
from ..distributed.plan import Bucket
from ..ops import magnitude
from ..ops.steps import stacks_in_turn, work_parts
from . import companion, storage
from .amp import Flags, flags_of, unless
from .batches import matrix_batch
from .constraints import constrain_
from .decay import decayed_update
from .groups import seeded
from .momentum import updates_from
from .settings import ADAMW_DEFAULTS, ADJUST
from .sharding import Sharding
from .state import (
    MOMENTUM,
    Batch,
    Updates,
    fit,
    gatherable,
    halved,
    held,
    unheld,
    widened,
    without_state,
)
from .telemetry import Probe, read
from .tensors import Numbers, is_distributed, local, sent

REGISTRY: dict[str, type[MatrixOptimizer]] = {}
# Methods that compute a direction. A subclass that overrides one does not inherit `at_once`.
DIRECTED_BY = {"direction", "directed", "polar", "iterated", "update_alike"}


class MatrixOptimizer(Sharding):
    """Base of every optimizer here. A step of a matrix group goes like this:

    1. check settings, gradients and state; ranks agree on the parameters to update;
    2. handle non-finite gradients by the group's `nonfinite`;
    3. `prepare`: run everything that may fail, before anything is written;
    4. momentum B <- mu B + (1-mu) G, and the updates U that follow from it;
    5. `direction` of U;
    6. W <- (1 - lr wd) W - lr factor direction, by the group's `decay`;
    7. the group's `constraint`, then `finish`.

    A subclass defines

    `state_names`: zero-initialized tensors of the parameter's shape. "momentum_buffer" asks for
        momentum by the group's `momentum`, `nesterov` and `heavy_ball`; without it U is a copy of
        the gradients.
    `direction(updates, batch, group)`: the step, before it is multiplied by lr and `factor` and
        subtracted from W. It may write the updates and the state.

    and, where its rule needs it,

    `matrix_state(x, group)`: names and shapes of further state tensors of one matrix, kept in
        float32 (float64 beside float64), whatever `state_dtype` says.
    `counts_steps`: True to count steps in state["step"]; rules read the count in batch.steps.
    `prepare(batch, group)`: step 3; its result is stored in batch.prepared.
    `factor(matrix, owner, group)`: a number per matrix, by default ADJUST[adjust_lr_fn].
    `rules`, `check_group`: checks of its own keys, one at a time and together.
    `companion`: overrides of ADAMW_DEFAULTS for groups with rule="adamw".
    `alike(p, group)`: a key; one call of `direction` gets only parameters with equal keys.
    `finish(params, group)`: work to do after the update.
    `at_once(batch, group)`: steps 4 to 6 by one fused op, for the settings which that op knows.
    `update(batch, group)`: replaces steps 4 to 6, for a rule of another form. A rule whose own
        `update` writes weights sets `mantissas = False`.

    Sharding says how matrices are updated that are cut across ranks.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.rules = {**super(cls, cls).rules, **cls.rules}
        if "at_once" not in vars(cls) and vars(cls).keys() & DIRECTED_BY:
            cls.at_once = MatrixOptimizer.at_once  # type: ignore[method-assign]
        if not abstract and issubclass(cls.__bases__[0], MatrixOptimizer):
            REGISTRY[cls.__name__] = cls  # but no wrapper (Lightning's): its first base is another

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.number = Numbers()
        self._seen: dict[int, Any] = {}  # id of a parameter -> state.Seen
        self.plans: dict[int, Any] = {}
        self._probes: dict[int, Probe] = {}
        super().__init__(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; mantissas of sharded parameters are float16 (`gatherable`)."""
        return gatherable(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but convert state to this optimizer's own dtypes."""
        super().load_state_dict(held(self, state_dict))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load state, and fill in keys that it lacks (torch.optim.Muon's has no rule).

        load_state_dict and unpickling both end here. If an error is raised, the optimizer stays as
        it was.
        """
        before = dict(self.__dict__)
        unheld(state["state"])
        super().__setstate__(state)
        self.__dict__.setdefault("_adamw", {**ADAMW_DEFAULTS, **self.companion})
        self.number = Numbers()
        self._settled, self._seen, self.plans, self._probes = {}, {}, {}, {}
        try:
            for group in self.param_groups:
                for key, value in self.group_defaults(group).items():
                    group.setdefault(key, value)
                self._check_settings(group)
                self._check_group_params(group)
                seeded(group)
                fit(self, group)
        except Exception:
            self.__dict__ = before
            raise

    # ---- what a subclass defines --------------------------------------------------------------

    def elementwise_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the group's `state_names`; override for settings that need fewer or other ones."""
        return self.state_names

    def matrix_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of further state tensors of one matrix (..., m, n)."""
        return {}

    def alike(self, p: Tensor, group: dict[str, Any]) -> Any:
        """Return a key; one call of `direction` gets only parameters with equal keys."""
        return None

    def direction(self, updates: Updates, batch: Batch, group: dict[str, Any]) -> Updates:
        """Return every matrix's step, before lr and factor; subclasses define this or `update`."""
        raise NotImplementedError(f"{self.name} writes neither `direction` nor `update`")

    def at_once(self, batch: Batch, group: dict[str, Any]) -> bool:
        """Do the whole step by one op, momentum to weights, and return True; or return False.

        It is a shortcut for the settings that the op knows; the result must agree with
        `direction`. A subclass that overrides one of DIRECTED_BY does not inherit it.
        """
        return False

    def factor(self, x: Tensor, owner: Tensor, group: dict[str, Any]) -> float:
        """Return the number that multiplies the direction of matrix x, a view of `owner`."""
        if "adjust_lr_fn" not in group:
            return 1.0
        return ADJUST[group["adjust_lr_fn"] or "original"](*x.shape[-2:])

    def momentum(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """Return mu as a 0-d tensor."""
        return self.scalar(group, "momentum", device)

    def weight_decay(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """Return the rate of the group's `decay` as a 0-d tensor."""
        return self.scalar(group, "weight_decay", device)

    def prepare(self, batch: Batch, group: dict[str, Any]) -> Any:
        """Compute what `update` finds in `batch.prepared`. It may raise, and writes nothing."""

    @property
    def prepares(self) -> bool:
        """True if the subclass has a `prepare`, which may fail."""
        return type(self).prepare is not MatrixOptimizer.prepare

    @property
    def has_matrix_state(self) -> bool:
        """True if the subclass has a `matrix_state`."""
        return type(self).matrix_state is not MatrixOptimizer.matrix_state

    def update(self, batch: Batch, group: dict[str, Any]) -> None:
        """Apply momentum, direction and decay, to as many matrices at a time as fit a buffer."""
        widens = group.get("mantissa") or group["state_dtype"] == "float32"
        if type(self).alike is MatrixOptimizer.alike and not widens:
            self.update_alike(batch, group)  # the usual case; asking each parameter takes 10 us
            return
        asked = (self.alike, halved, widened)
        kinds = [tuple(ask(p, group) for ask in asked) for p in batch.owners]
        different = list(dict.fromkeys(kinds))
        for kind in different:
            indices = [i for i, k in enumerate(kinds) if k == kind]
            self.update_alike(batch.part(indices) if len(different) > 1 else batch, group)

    def update_alike(self, batch: Batch, group: dict[str, Any]) -> None:
        """Update matrices that one call of `direction` may get together."""
        if self.at_once(batch, group):
            return
        device = batch.params[0].device
        flags = flags_of(self, device)
        dtype = torch.float32 if widened(batch.owners[0], group) else None
        lr, rate = self.scalar(group, "lr", device), self.weight_decay(group, device)
        mu = self.momentum(group, device) if MOMENTUM in batch.state else None
        probe = self.probe(group)
        by_part = work_parts(batch.params)
        for part, stacks in zip(by_part, stacks_in_turn(batch.params, by_part, dtype), strict=True):
            some = batch.part([i for indices in part for i in indices])
            with unless(flags.found_inf, some.written_by_rules(group)):
                updates = self.directed(some, stacks, mu, group, flags)
            factors = self.factors(some, group)
            if probe:
                probe.add_directions(updates, factors, lr)
            decayed_update(
                some.params, updates.matrices, lr, rate, factors, group, flags.found_inf,
                some.mantissas,
            )  # fmt: skip

    def directed(
        self,
        batch: Batch,
        stacks: list[Tensor],
        mu: Tensor | None,
        group: dict[str, Any],
        flags: Flags,
    ) -> Updates:
        """Write updates (momentum or gradients) into `stacks` and return their direction."""
        updates = updates_from(batch, stacks, mu, group, flags)
        if probe := self.probe(group):
            probe.add_updates(updates)
        return self.direction(updates, batch, group)

    def factors(self, batch: Batch, group: dict[str, Any]) -> list[float]:
        pairs = zip(batch.params, batch.owners, strict=True)
        return [self.factor(x, owner, group) for x, owner in pairs]

    # ---- the step -----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Gradients are read, never written.

        Hyperparameters, gradients and state are checked before anything is written: an error leaves
        parameters and state as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        new: list[Tensor] = []  # local: a compiled step cannot write attributes in torch 2.11
        try:
            work = [(group, self._checked(group, new)) for group in self.param_groups]
        except (TypeError, ValueError) as error:
            agreement.refuse(self, error)
            raise
        agreement.check(self, work)
        finite_indices = [self._finite(group, indices) for group, indices in work]
        plans = self._plans(finite_indices, new)
        updated: list[Tensor] = []
        for (group, indices), finite, plan in zip(work, finite_indices, plans, strict=True):
            if len(finite) < len(indices):
                group["skipped"] = group.get("skipped", 0) + len(indices) - len(finite)
            params = [group["params"][i] for i in finite]
            self._measure(group, params, len(indices))
            if params and group["rule"] == "adamw":
                companion.update(self, params, group)
            elif params:
                self._matrix_update(*plan, group)
                self.finish(params, group)
            if params and (seed := storage.seed_of(group)) is not None:
                seed.add_(1)
            updated += params
        if updated:
            torch.autograd.graph.increment_version(updated)
        return loss

    def telemetry(self) -> list[dict[str, float]]:
        """Return each group's latest measures, by the names of telemetry.py; one synchronization.

        A group with `telemetry=k` measures its first step and then every k-th.
        """
        return read([self._probes.get(id(group)) for group in self.param_groups])

    def probe(self, group: Mapping[str, Any]) -> Probe | None:
        """Return the group's probe if this step is measured, else None."""
        if not group["telemetry"] or torch.compiler.is_compiling():
            return None
        probe = self._probes.setdefault(id(group), Probe())
        return probe if probe.on else None

    def _measure(self, group: dict[str, Any], params: list[Tensor], asked: int) -> None:
        """Begin measuring a step that updates `params`, out of `asked` that have gradients."""
        if group["telemetry"] and not torch.compiler.is_compiling():
            probe = self._probes.setdefault(id(group), Probe())
            probe.begin(group["telemetry"], asked, asked - len(params))
            if probe.on and params:
                probe.add_gradients([local(p.grad) for p in params])

    def _plans(
        self, finite_indices: list[list[int]], new: list[Tensor]
    ) -> list[tuple[Batch | None, list[Bucket]]]:
        """Plan each group's update: a batch of whole matrices, and buckets of sharded ones.

        If anything fails, the state that was made for `new` parameters is removed.
        """
        plans: list[tuple[Batch | None, list[Bucket]]] = []
        try:
            for group, indices in zip(self.param_groups, finite_indices, strict=True):
                params = [group["params"][i] for i in indices]
                if group["rule"] == "adamw":
                    plans.append((None, []))
                    continue
                batch = None
                cut, whole = owned_among(self, params, group)
                if whole:
                    batch = matrix_batch(self, whole, group)
                    if group["state_dtype"] in storage.SMALLER and self.prepares:
                        batch = storage.opened(batch, self.elementwise_state(group), group)
                with agreement.experts_succeed(self, cut, group):
                    if batch is not None:
                        batch = batch._replace(prepared=self.prepare(batch, group))
                plans.append((batch, shards.plan(self, cut, group) if cut else []))
        except Exception:
            for p in new:
                self.state.pop(p, None)
            raise
        return plans

    def _matrix_update(
        self, batch: Batch | None, buckets: list[Bucket], group: dict[str, Any]
    ) -> None:
        if buckets:  # compiled steps have none: tracing cannot handle them
            shards.update(self, buckets, group)
        if batch is None:
            return
        if self.counts_steps:
            for p, t in zip(batch.owners, batch.steps, strict=True):
                self.state[p]["step"] = t
        keys = self.elementwise_state(group)
        storage.update(batch, keys, group, self.update, self.elementwise)
        constrain_(batch.params, group, batch.state)

    def _checked(self, group: dict[str, Any], new: list[Tensor]) -> list[int]:
        """Check settings, gradients and state; return the indices of parameters with gradients.

        Parameters without state are appended to `new`.
        """
        self._check_changed_settings(group)
        indices = self._with_gradients(group)
        stateless = without_state(self, group, indices)
        if any(map(is_distributed, stateless)):
            self.check_shardings(group)
        new += stateless
        return indices

    def _finite(self, group: dict[str, Any], indices: list[int]) -> list[int]:
        """Return the indices of the parameters to update under the group's `nonfinite` rule."""
        if group["nonfinite"] == "propagate" or not indices:
            return indices
        params = [group["params"][i] for i in indices]
        norms = magnitude.unchecked([local(p.grad).reshape(1, 1, -1) for p in params])
        finite = agreement.everywhere(self, group, params, norms.isfinite()).tolist()
        bad = [i for i, ok in zip(indices, finite, strict=True) if not ok]
        if bad and group["nonfinite"] == "error":
            raise ValueError(
                f"{self.name}: gradients must be finite (nonfinite='error'), got inf or nan for "
                f"parameter {self.label(group, bad[0])}"
                + (f" and {len(bad) - 1} more" * (len(bad) > 1))
            )
        return [i for i in indices if i not in set(bad)]

    def scalar(self, group: dict[str, Any], key: str, device: torch.device) -> Tensor:
        """Return group[key] as a 0-d tensor on `device`, float64 unless it is a tensor already."""
        value = group[key]
        if isinstance(value, Tensor):
            return sent(value.detach(), device).reshape(())
        return self.number(value, device)
