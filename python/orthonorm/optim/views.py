"""The matrices of a parameter: views, never copies, of the parameter and its state.

Param-group keys, all optional, apply to every parameter of the group:
    flatten    True: (out, ...) becomes out x rest; False: leading dimensions are a batch; None:
               4-D and 5-D weights (convolutions) are flattened, 3-D ones (expert stacks) batches.
    transpose  True: the matrix is W^T, for weights and stacks stored as inputs x outputs
               (transformers' Conv1D). It is no key of convolutions.
    split      row counts of the matrices fused along their rows, as (d, d_kv, d_kv) of a QKV
               weight; of a batch, every matrix is cut so.
    heads      number of equal row blocks that are matrices of their own, or one per split piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import _checks as check

VIEW_DEFAULTS: dict[str, Any] = {
    "flatten": None, "transpose": False, "split": None, "heads": None,
}  # fmt: skip


def heads_of(group: Mapping[str, Any], pieces: Sequence[Any]) -> Sequence[int]:
    """Return the number of heads of every split piece."""
    heads = group.get("heads")
    if heads is None:
        return (1,) * len(pieces)
    return (heads,) * len(pieces) if isinstance(heads, int) else heads


def flattens(shape: Sequence[int], group: Mapping[str, Any]) -> bool:
    """True if a parameter of this shape becomes out x rest."""
    flatten = group.get("flatten")
    return len(shape) > 3 if flatten is None else bool(flatten) and len(shape) > 2


def is_matrix(group: Mapping[str, Any]) -> bool:
    """True if a parameter of two dimensions is itself its one matrix."""
    keys = ("transpose", "split", "heads")
    return all(group.get(key, VIEW_DEFAULTS[key]) == VIEW_DEFAULTS[key] for key in keys)


def cuts_stacks(shape: Sequence[int], group: Mapping[str, Any]) -> bool:
    """True if every matrix of a batch is cut into several."""
    cut = group.get("split") is not None or group.get("heads") is not None
    return cut and len(shape) > 2 and not flattens(shape, group)


def check_views(
    name: str, shape: Sequence[int], group: Mapping[str, Any], min_dim: int = 2
) -> None:
    """Raise ValueError unless a parameter of this shape allows the views of the group's keys."""
    if len(shape) < min_dim:
        raise ValueError(
            f"{name} must have at least two dimensions to be a matrix, got shape {tuple(shape)}; "
            "put it in a group with rule='adamw' (orthonorm.optim.split_params does)"
        )
    check.choice(name, "flatten", group.get("flatten"), (None, True, False))
    flat, turned = flattens(shape, group), group.get("transpose", False)
    if flat and turned:
        raise ValueError(
            f"{name}: transpose must be False for flattened weights, got shape {tuple(shape)}"
        )
    split, heads = group.get("split"), group.get("heads")
    if split is None and heads is None:
        return
    if len(shape) < 2:
        raise ValueError(f"{name}: split and heads need matrices, got shape {tuple(shape)}")
    rows = shape[0] if flat else shape[-1 if turned else -2]
    pieces = (rows,) if split is None else check_counts(name, "split", split)
    if sum(pieces) != rows:
        raise ValueError(f"{name}: split must be row counts that add up to {rows}, got {split}")
    counts = check_counts(name, "heads", heads_of(group, pieces))
    if len(counts) != len(pieces):
        raise ValueError(f"{name}: heads must be one number or one per split piece, got {heads}")
    for rows, count in zip(pieces, counts, strict=True):
        if rows % count:
            raise ValueError(f"{name}: heads must divide the {rows} rows, got {count}")


def check_counts(name: str, label: str, counts: object) -> Sequence[int]:
    """Return `counts` if they are positive integers, else raise TypeError or ValueError."""
    if not isinstance(counts, (tuple, list)):
        raise TypeError(f"{name}: {label} must be integers, got {counts!r}")
    for count in counts:
        check.integer(name, label, count, 1)
    return counts


def memory_order(t: Tensor) -> list[int]:
    """Return dimension 0, then the others from largest to smallest stride (for channels_last)."""
    return [0, *sorted(range(1, t.dim()), key=t.stride, reverse=True)]


def matrices(t: Tensor, like: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
    """Return `t` (parameter, gradient or state of `like`) as matrices (..., m, n).

    A flattened weight's columns are in the memory order of `like`, the parameter, so that the
    result is a view. Polar factors and one-sided rotations do not depend on the columns' order.
    A vector, for rules that take vectors, becomes one column.
    """
    if like.dim() < 2:
        return [t.reshape(-1, 1)]
    if flattens(like.shape, group):
        t = t.permute(memory_order(like)).reshape(t.shape[0], -1)
    elif group.get("transpose"):
        t = t.mT
    split, heads = group.get("split"), group.get("heads")
    if split is None and heads is None:
        return [t]
    pieces = [t] if split is None else list(t.split(list(split), -2))
    return [
        piece if count == 1 and heads is None else piece.unflatten(-2, (count, -1))
        for piece, count in zip(pieces, heads_of(group, pieces), strict=True)
    ]
