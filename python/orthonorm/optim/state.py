"""State tensors of a parameter, and the arguments of rules: batches of matrices and updates."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import dequantize_blocks_, quantize_blocks_
from ..ops.blocks import scales_shape
from ..ops.mantissa import joined
from .constraints import VECTOR, constraint_state
from .storage import SCALES, UNSIGNED, matrix_dtype
from .tensors import bits_as, is_distributed, state_zeros, whole
from .views import matrices

if TYPE_CHECKING:
    from ..distributed.spread import Spread
    from .base import MatrixOptimizer

ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"
MANTISSA = "mantissa"
BITS = torch.float16  # dtype of sharded mantissas in state dicts, the same bits (`gatherable`)


def halved(p: Tensor, group: Mapping[str, Any]) -> bool:
    """True if `p` is one half of a float32 weight (ops/mantissa.py).

    The other half is in its state, and the rest of its state is float32.
    """
    return p.dtype == torch.bfloat16 and bool(group.get("mantissa"))


def widened(p: Tensor, group: Mapping[str, Any]) -> bool:
    """True if `p` has 16 bits, but state and updates in float32, as a float32 weight has."""
    if group["state_dtype"] == "float32":
        return p.dtype in (torch.bfloat16, torch.float16)
    return halved(p, group)


def working_dtype(p: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the updates of `p`, and of state of its shape unless that is smaller."""
    return torch.float32 if widened(p, group) else p.dtype


class Batch(NamedTuple):
    """Arguments of a rule: parallel lists over the matrices of a group."""

    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    owners: list[Tensor]  # the parameter each matrix is a view of
    steps: list[int]  # step number of each matrix, from 1; 0 for rules that do not count
    prepared: Any = None  # the result of `prepare`
    halves: Sequence[Any] = ()  # per matrix its mantissa, or None if not `halved`; may be empty
    kept: dict[str, list[Tensor]] | None = None  # stored state that `state` is a copy of: storage
    spread: Spread | None = None  # ranks that each hold a part of every matrix's long side

    @property
    def mantissas(self) -> list[Tensor] | None:
        """Mantissas of the matrices, or None; in such a batch all have one, or none has."""
        return list(self.halves) if self.halves and self.halves[0] is not None else None

    @property
    def weights(self) -> list[Tensor]:
        """Weights at full precision: float32 where matrices have mantissas, else `params`."""
        if self.mantissas is None:
            return self.params
        return [joined(w, m) for w, m in zip(self.params, self.mantissas, strict=True)]

    def written_by_rules(self, group: Mapping[str, Any]) -> list[Tensor]:
        """Return the state that rules write themselves, not by an op that obeys `found_inf`."""
        own = {k: v for k, v in self.state.items() if k != MOMENTUM or group["heavy_ball"]}
        return [t for tensors in own.values() for t in tensors]

    def part(self, indices: list[int]) -> Batch:
        return Batch(
            [self.params[i] for i in indices],
            [self.grads[i] for i in indices],
            {key: [values[i] for i in indices] for key, values in self.state.items()},
            [self.owners[i] for i in indices],
            [self.steps[i] for i in indices],
            halves=[self.halves[i] for i in indices] if self.halves else (),
        )


def by_step(steps: list[int]) -> list[tuple[int, list[int]]]:
    """Group indices by step number: (step, indices) pairs, usually one for all.

    It compares and does not hash, since hashing makes torch.compile build a graph for every step.
    """
    found: list[tuple[int, list[int]]] = []
    rest = list(range(len(steps)))
    while rest:
        t = steps[rest[0]]
        found.append((t, [i for i in rest if steps[i] == t]))
        rest = [i for i in rest if steps[i] != t]
    return found


class Updates(NamedTuple):
    """The update of every matrix of a batch, in work buffers that a rule may write.

    Equal shapes are stacked, (k, ..., m, n), so that products are batched.
    """

    stacks: list[Tensor]
    norms: Tensor | None = None  # |U|_F of every matrix, float64, if the momentum op measured it

    @property
    def matrices(self) -> list[Tensor]:
        """Entries of the stacks, in the order of the batch."""
        return [u for stack in self.stacks for u in stack.unbind()]


def shapes(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the state tensors of one parameter."""
    if group["rule"] == "adamw":
        found: dict[str, Any] = dict.fromkeys(ADAMW_STATE, check.shape(p)) | {"step": ()}
        found |= scales_of(whole(p).reshape(1, -1), ADAMW_STATE, group)
    else:
        found = dict.fromkeys(opt.elementwise_state(group), check.shape(p))
        for _, named in matrix_shapes(opt, p, group):
            found |= {key: shape for _, key, shape in named}
    return found | ({MANTISSA: check.shape(p)} if halved(p, group) else {})


def scales_of(x: Tensor, keys: Iterable[str], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return names and shapes of the scales of one matrix's 8-bit state; {} for other dtypes."""
    if group["state_dtype"] != "8bit":
        return {}
    return dict.fromkeys((key + SCALES for key in keys), scales_shape(x.shape))


def kept_dtype(group: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype of state that is stored smaller than it is computed with, else None.

    It concerns only state of the parameter's shape.
    """
    return {"8bit": torch.uint8, "bfloat16": torch.bfloat16}.get(group["state_dtype"])


def fit(opt: MatrixOptimizer, group: dict[str, Any]) -> None:
    """Convert the loaded state of a group to the form that its settings ask for, and check it."""
    for i, p in enumerate(group["params"]):
        refit(opt, p, group)
        check_state(opt, group, i)


def refit(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> None:
    """Convert the loaded state of a parameter to the form that its group's settings ask for."""
    state: dict[str, Any] = opt.state.get(p, {})
    adamw = group["rule"] == "adamw"
    if not halved(p, group):
        state.pop(MANTISSA, None)
    elif getattr(state.get(MANTISSA), "dtype", None) == BITS:
        state[MANTISSA] = bits_as(state[MANTISSA], torch.int16)
    elif state and MANTISSA not in state:
        state[MANTISSA] = torch.zeros_like(p, dtype=torch.int16)
    like = torch.contiguous_format if adamw else torch.preserve_format
    for named in () if adamw else (named for _, named in matrix_shapes(opt, p, group)):
        for _, key, _ in named:
            t = state.get(key)
            if isinstance(t, Tensor) and t.is_floating_point():
                state[key] = t.to(matrix_dtype(p, key))
    for key in ADAMW_STATE if adamw else opt.elementwise_state(group):
        t, wanted = state.get(key), kept_dtype(group)
        own = wanted or working_dtype(p, group)
        if not isinstance(t, Tensor) or t.shape != p.shape or t.dtype == own:
            continue
        if t.layout != torch.strided:  # left for check_state to refuse
            continue
        scaled = numbered(key + SCALES, len(views_of(whole(t), whole(p), group)))
        if t.dtype != torch.uint8 and not state.keys().isdisjoint(scaled):
            raise ValueError(
                f"{opt.name}: state {key!r} beside its scales must be uint8, got {t.dtype}"
            )
        if t.dtype == torch.uint8:
            read = torch.zeros_like(p, dtype=torch.float32, memory_format=like)
            scales = [state.pop(k) for k in scaled]
            codes = views_of(t, p, group)
            dequantize_blocks_(views_of(read, p, group), codes, scales, key not in UNSIGNED)
            t = read
        if wanted == torch.uint8:
            new, given = zeros_for(p, torch.uint8, group), views_of(t, p, group)
            scales = [torch.zeros(scales_shape(x.shape), device=x.device) for x in given]
            quantize_blocks_(views_of(new, p, group), scales, given, key not in UNSIGNED)
            state |= zip(scaled, scales, strict=True)
            t = new
        state[key] = t.to(own)


def numbered(name: str, count: int) -> list[str]:
    """Return the state keys of `name` for each of a parameter's `count` matrices."""
    return [name] if count == 1 else [f"{name}.{i}" for i in range(count)]


def views_of(t: Tensor, p: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """View state of the shape of `p` as the matrices that are quantized one by one."""
    return [t.reshape(1, -1)] if group["rule"] == "adamw" else matrices(t, p, group)


def zeros_for(p: Tensor, dtype: torch.dtype, group: Mapping[str, Any]) -> Tensor:
    """Return zeros of the shape of `p`, in a memory layout that lets `views_of` return views."""
    flat = group["rule"] == "adamw" and group["state_dtype"] == "8bit"
    kind = torch.contiguous_format if flat else torch.preserve_format
    return torch.zeros_like(p, dtype=dtype, memory_format=kind)


Shapes = list[tuple[Tensor, list[tuple[str, str, tuple[int, ...]]]]]


def matrix_shapes(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> Shapes:
    """Return a parameter's matrices, each with (name, key, shape) of its state tensors.

    The matrices are whole ones even if `p` is sharded; use their shapes only. The key in the state
    dict is the name, numbered where a parameter has several matrices.
    """
    pieces = matrices(whole(p), whole(p), group)
    count = len(pieces)
    return [
        (x, [(k, numbered(k, count)[i], shape) for k, shape in named_state(opt, x, group).items()])
        for i, x in enumerate(pieces)
    ]


def check_state(opt: MatrixOptimizer, group: dict[str, Any], index: int) -> None:
    """Raise unless a parameter's state is empty, or complete, dense and of the right shapes.

    State of a constraint may be missing, since the constraint may be new.
    """
    p = group["params"][index]
    state, wanted = opt.state.get(p, {}), shapes(opt, p, group)
    label = f"{opt.name}: parameter {opt.label(group, index)}"
    needed = {key for key in wanted if not key.startswith(VECTOR)}
    if 0 < len(needed - state.keys()) < len(needed):
        raise ValueError(f"{label}: state must have {sorted(wanted)}, got {sorted(state)}")
    for key in wanted.keys() & state.keys():
        dtype = getattr(state[key], "dtype", type(state[key]).__name__)
        if dtype == torch.uint8 and group["state_dtype"] == "8bit":
            pass
        elif key != MANTISSA:
            check.tensor(label, f"state {key!r}", state[key])
        elif dtype != torch.int16:
            raise TypeError(f"{label}: state {key!r} must be int16, got {dtype}")
        check.equal_shape(label, f"state {key!r}", state[key], wanted[key])
        check.same_device(label, parameter=[p], state=[state[key]])


class Seen(NamedTuple):
    """Properties of a parameter, its gradient and its state when they were last checked."""

    shape: torch.Size
    device: torch.device
    on_cpu: bool
    keys: int
    state: list[tuple[str, weakref.ref[Tensor], torch.Size]]

    def still(self, p: Tensor, state: Mapping[str, Any]) -> bool:
        """True if the state tensors are the same and no shape or device has changed since.

        On CPUs only the parameter's shape is compared, as kernels there check the rest themselves.
        """
        shape, device, on_cpu, keys, tensors = self
        if p.shape != shape:
            return False
        for key, ref, _ in tensors:
            if state.get(key) is not ref():
                return False
        if len(state) != keys:
            return False
        if on_cpu:
            return True
        g: Any = p.grad
        if g.shape != shape or g.device != device or p.device != device:
            return False
        same = ((state[key], size) for key, _, size in tensors)
        return all(t.shape == size and t.device == device for t, size in same)


def without_state(opt: MatrixOptimizer, group: dict[str, Any], indices: list[int]) -> list[Tensor]:
    """Return the parameters without state; check those that have changed since the last check.

    Changed are parameters whose state was replaced, or whose `data` was set. They must be checked
    because the ops of a step trust their arguments. Checking all with `check_state` at every step
    took 1.0 ms for 148 parameters; this takes 0.15 ms (2026-11). In a traced step the ops check
    their arguments, before any of them runs.
    """
    stateless: list[Tensor] = []
    changed: list[int] = []
    for i in () if torch.compiler.is_compiling() else indices:
        p = group["params"][i]
        state, seen = opt.state.get(p, {}), opt._seen.get(id(p))
        if not state:
            stateless.append(p)
        if seen is None or not seen.still(p, state):
            changed.append(i)
    if changed:
        check.same_device(opt.name, params=[group["params"][i] for i in indices])
        opt._check_params(group, changed)
    for i in changed:
        p = group["params"][i]
        label = f"{opt.name}: parameter {opt.label(group, i)}"
        check.equal_shape(label, "gradient", p.grad, p.shape)
        check.same_device(label, parameter=[p], gradient=[p.grad])
        check_state(opt, group, i)
        state = opt.state.get(p, {})
        refs = [(k, weakref.ref(t), t.shape) for k, t in state.items() if isinstance(t, Tensor)]
        on_cpu = p.device.type == "cpu"
        opt._seen[id(p)] = Seen(p.shape, p.device, on_cpu, len(state), refs)
    return stateless


def matrix_state_of(
    opt: MatrixOptimizer,
    p: Tensor,
    group: dict[str, Any],
    shapes: Shapes,
    zeros: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return a parameter's state; make missing tensors, those of matrices from `zeros` by key."""
    state, dtype = opt.state[p], working_dtype(p, group)
    dtypes = dict.fromkeys(opt.elementwise_state(group), kept_dtype(group) or dtype)
    if halved(p, group):
        dtypes[MANTISSA] = torch.int16
    for key, kind in dtypes.items():
        if key not in state:
            state[key] = torch.zeros_like(p, dtype=kind, memory_format=torch.preserve_format)
    for x, named in shapes:
        for _, key, shape in named:
            if key not in state and zeros is not None:
                state[key] = zeros[key]
            elif key not in state:
                made = state_zeros(p, shape, x.dim() - 2)
                state[key] = made.to(matrix_dtype(p, key))
    return state


def named_state(
    opt: MatrixOptimizer, x: Tensor, group: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all state that belongs to one matrix."""
    scales = scales_of(x, opt.elementwise_state(group), group)
    return opt.matrix_state(x, group) | scales | constraint_state(x, group)


def gatherable(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict with sharded mantissas as float16 of the same bits.

    Others gather whole tensors by torch's collectives, which do not support int16.
    """
    state = dict(saved["state"])
    for p, named in state.items():
        if is_distributed(named.get(MANTISSA)):
            state[p] = {**named, MANTISSA: bits_as(named[MANTISSA], BITS)}
    return {**saved, "state": state}


class Held:
    """Wrapper that hides a tensor from torch's `load_state_dict`, which would cast it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held(opt: MatrixOptimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with its tensors in `Held`, all but the step counts.

    Their dtype may differ from their parameter's; so `refit` gets them as they were saved. The
    settings of how state is stored are replaced by this optimizer's own.
    """
    state = {
        p: {k: Held(t) if isinstance(t, Tensor) and k != "step" else t for k, t in named.items()}
        for p, named in saved["state"].items()
    }
    groups = saved["param_groups"]
    if len(groups) == len(opt.param_groups):  # else torch raises an error
        names = ("state_dtype", "stochastic_rounding", MANTISSA)
        pairs = zip(groups, opt.param_groups, strict=True)
        groups = [{**theirs, **{k: ours[k] for k in names if k in ours}} for theirs, ours in pairs]
    return {**saved, "state": state, "param_groups": groups}


def unheld(state: Mapping[Any, Any]) -> None:
    """Take tensors out of `Held` in place, and move them to their parameter's device.

    Step counts too: torch leaves them where they were saved, and `torch.optim.AdamW` saves the
    CPU's.
    """
    for p, named in state.items():
        for key, value in named.items():
            tensor = value.tensor if isinstance(value, Held) else value
            named[key] = tensor.to(p.device) if isinstance(tensor, Tensor) else tensor
