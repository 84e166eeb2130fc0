"""State tensors of a parameter, and what rules see: batches of matrices, and their updates."""

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
from .storage import SCALES, UNSIGNED
from .tensors import bits_as, is_distributed, state_zeros, whole
from .views import matrices

if TYPE_CHECKING:
    from ..distributed.spread import Spread
    from .base import MatrixOptimizer

ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"
MANTISSA = "mantissa"
BITS = torch.float16  # what state dicts have mantissas in where they are sharded


def halved(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether `p` is half of a float32 weight, its state has the other half (ops/mantissa.py) and
    is of float32 too."""
    return p.dtype == torch.bfloat16 and bool(group.get("mantissa"))


def widened(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether state and updates of `p`, of 16 bits, are float32, as beside a float32 weight."""
    if group["state_dtype"] == "float32":
        return p.dtype in (torch.bfloat16, torch.float16)
    return halved(p, group)


def working_dtype(p: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the updates of `p`, and of its state where `state_dtype` keeps it no smaller."""
    return torch.float32 if widened(p, group) else p.dtype


class Batch(NamedTuple):
    """What a rule sees: parallel lists over the matrices of a group."""

    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    owners: list[Tensor]  # the parameter each matrix is a view of
    steps: list[int]  # of each matrix, this one included; 0 for rules that do not count
    prepared: Any = None  # what `prepare` returned
    halves: Sequence[Any] = ()  # mantissas of the `halved`, None for others; or nothing
    kept: dict[str, list[Tensor]] | None = None  # where `state` is read from (storage.py)
    spread: Spread | None = None  # the ranks of which this one has a part of every long side

    @property
    def mantissas(self) -> list[Tensor] | None:
        """The other halves of matrices that are alike, or None."""
        return list(self.halves) if self.halves and self.halves[0] is not None else None

    @property
    def weights(self) -> list[Tensor]:
        """The numbers that the matrices stand for: in float32 where they have mantissas."""
        if self.mantissas is None:
            return self.params
        return [joined(w, m) for w, m in zip(self.params, self.mantissas, strict=True)]

    def written_by_rules(self, group: Mapping[str, Any]) -> list[Tensor]:
        """State that no op writes which knows when to leave it."""
        own = {k: v for k, v in self.state.items() if k != MOMENTUM or group["heavy_ball"]}
        return [t for tensors in own.values() for t in tensors]

    def part(self, rows: list[int]) -> Batch:
        return Batch(
            [self.params[i] for i in rows],
            [self.grads[i] for i in rows],
            {key: [values[i] for i in rows] for key, values in self.state.items()},
            [self.owners[i] for i in rows],
            [self.steps[i] for i in rows],
            halves=[self.halves[i] for i in rows] if self.halves else (),
        )


def by_step(steps: list[int]) -> list[tuple[int, list[int]]]:
    """The steps there are, each with its indices: usually one, for all.

    By comparisons, not hashing, which would have torch.compile make a graph for every step.
    """
    found: list[tuple[int, list[int]]] = []
    rest = list(range(len(steps)))
    while rest:
        t = steps[rest[0]]
        found.append((t, [i for i in rest if steps[i] == t]))
        rest = [i for i in rest if steps[i] != t]
    return found


class Updates(NamedTuple):
    """The update of every matrix of a batch, in work buffers: a rule may write them.

    Equal shapes are stacked, (k, ..., m, n), so that products are batched.
    """

    stacks: list[Tensor]
    norms: Tensor | None = None  # |U|_F of every matrix, float64, where momentum measured it

    @property
    def matrices(self) -> list[Tensor]:
        """The entries of the stacks, in the order of the batch."""
        return [u for stack in self.stacks for u in stack.unbind()]


def shapes(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state tensors of one parameter."""
    if group["rule"] == "adamw":
        found: dict[str, Any] = dict.fromkeys(ADAMW_STATE, check.shape(p)) | {"step": ()}
        found |= scales_of(whole(p).reshape(1, -1), ADAMW_STATE, group)
    else:
        found = dict.fromkeys(opt.elementwise_state(group), check.shape(p))
        for _, named in matrix_shapes(opt, p, group):
            found |= {key: shape for _, key, shape in named}
    return found | ({MANTISSA: check.shape(p)} if halved(p, group) else {})


def scales_of(x: Tensor, keys: Iterable[str], group: Mapping[str, Any]) -> dict[str, Any]:
    """Names and shapes of the scales of the 8-bit state of one matrix."""
    if group["state_dtype"] != "8bit":
        return {}
    return dict.fromkeys((key + SCALES for key in keys), scales_shape(x.shape))


def kept_dtype(group: Mapping[str, Any]) -> torch.dtype | None:
    """What state of the parameter's shape is kept in where that is smaller than it is computed
    with, else None."""
    return {"8bit": torch.uint8, "bfloat16": torch.bfloat16}.get(group["state_dtype"])


def fit(opt: MatrixOptimizer, group: dict[str, Any]) -> None:
    """Turn the loaded state of a group into what it keeps, and check it."""
    for i, p in enumerate(group["params"]):
        refit(opt, p, group)
        check_state(opt, group, i)


def refit(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> None:
    """Turn loaded state of a parameter into what its group keeps."""
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
            if isinstance(t, Tensor) and t.is_floating_point() and SCALES not in key:
                state[key] = t.to(working_dtype(p, group))
    for key in ADAMW_STATE if adamw else opt.elementwise_state(group):
        t, wanted = state.get(key), kept_dtype(group)
        own = wanted or working_dtype(p, group)
        if not isinstance(t, Tensor) or t.shape != p.shape or t.dtype == own:
            continue
        if t.layout != torch.strided:  # check_state refuses it
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
    """The keys of what each of a parameter's matrices has by this name."""
    return [name] if count == 1 else [f"{name}.{i}" for i in range(count)]


def views_of(t: Tensor, p: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """State of the shape of `p` as the matrices whose elements are quantized together."""
    return [t.reshape(1, -1)] if group["rule"] == "adamw" else matrices(t, p, group)


def zeros_for(p: Tensor, dtype: torch.dtype, group: Mapping[str, Any]) -> Tensor:
    """Of the shape of `p`, and such that its matrices are views."""
    flat = group["rule"] == "adamw" and group["state_dtype"] == "8bit"
    kind = torch.contiguous_format if flat else torch.preserve_format
    return torch.zeros_like(p, dtype=dtype, memory_format=kind)


Shapes = list[tuple[Tensor, list[tuple[str, str, tuple[int, ...]]]]]


def matrix_shapes(opt: MatrixOptimizer, p: Tensor, group: dict[str, Any]) -> Shapes:
    """The matrices of a parameter (whole, not to be read), each with its state: (name, key, shape).

    The key in the state dict is the name, numbered where a parameter has several matrices.
    """
    pieces = matrices(whole(p), whole(p), group)
    count = len(pieces)
    return [
        (x, [(k, numbered(k, count)[i], shape) for k, shape in named_state(opt, x, group).items()])
        for i, x in enumerate(pieces)
    ]


def check_state(opt: MatrixOptimizer, group: dict[str, Any], index: int) -> None:
    """State, where there is one, is complete, dense and of the shapes it was made with; but that of
    a constraint, which may be new."""
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
    """A parameter, its gradient and its state as they were when they were checked."""

    shape: torch.Size
    device: torch.device
    on_cpu: bool
    keys: int
    state: list[tuple[str, weakref.ref[Tensor], torch.Size]]

    def still(self, p: Tensor, state: Mapping[str, Any]) -> bool:
        """True if state is the same tensors, and no `data` of other shape or device was set.

        Kernels for CPUs look themselves, so there the parameter's shape is enough.
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
    """Parameters that have none. What was replaced, or set to other `data`, since it was checked is
    checked: the ops of a step take it on trust.

    `check_state` at every step would cost more than some steps (148 parameters: 1.0 ms, so 0.15 ms;
    2026-11). A traced step is checked by its ops, before any of them runs.
    """
    found: list[Tensor] = []
    changed: list[int] = []
    for i in () if torch.compiler.is_compiling() else indices:
        p = group["params"][i]
        state, seen = opt.state.get(p, {}), opt._seen.get(id(p))
        if not state:
            found.append(p)
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
        kept = [(k, weakref.ref(t), t.shape) for k, t in state.items() if isinstance(t, Tensor)]
        on_cpu = p.device.type == "cpu"
        opt._seen[id(p)] = Seen(p.shape, p.device, on_cpu, len(state), kept)
    return found


def matrix_state_of(
    opt: MatrixOptimizer,
    p: Tensor,
    group: dict[str, Any],
    shapes: Shapes,
    zeros: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The state of a parameter, made where it is new: that of its matrices by key in `zeros`."""
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
                state[key] = made.to(torch.float32 if SCALES in key else dtype)
    return state


def named_state(
    opt: MatrixOptimizer, x: Tensor, group: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """All state that belongs to one matrix."""
    scales = scales_of(x, opt.elementwise_state(group), group)
    return opt.matrix_state(x, group) | scales | constraint_state(x, group)


def gatherable(saved: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose sharded mantissas are float16 of the same bits: torch's collectives, by
    which others make whole tensors of it, know no int16."""
    state = dict(saved["state"])
    for p, named in state.items():
        if is_distributed(named.get(MANTISSA)):
            state[p] = {**named, MANTISSA: bits_as(named[MANTISSA], BITS)}
    return {**saved, "state": state}


class Held:
    """A tensor that torch's `load_state_dict` does not take for one, and so does not cast."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held(opt: MatrixOptimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the tensors whose dtype may not be their parameter's (all but the step
    counts) in `Held`, from which `refit` gets what was saved, and this optimizer's own settings of
    how state is kept."""
    state = {
        p: {k: Held(t) if isinstance(t, Tensor) and k != "step" else t for k, t in named.items()}
        for p, named in saved["state"].items()
    }
    groups = saved["param_groups"]
    if len(groups) == len(opt.param_groups):  # else torch says what is wrong
        names = ("state_dtype", "stochastic_rounding", MANTISSA)
        pairs = zip(groups, opt.param_groups, strict=True)
        groups = [{**theirs, **{k: ours[k] for k in names if k in ours}} for theirs, ours in pairs]
    return {**saved, "state": state, "param_groups": groups}


def unheld(state: Mapping[Any, Any]) -> None:
    """Take the tensors out again, to their parameter's device."""
    for p, named in state.items():
        for key, value in named.items():
            if isinstance(value, Held):
                tensor = value.tensor
                named[key] = tensor.to(p.device) if isinstance(tensor, Tensor) else tensor
