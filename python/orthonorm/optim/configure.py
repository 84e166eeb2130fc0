"""Make an optimizer from a model and a class name, and report which weights each rule takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .adamw import AdamW
from .base import REGISTRY, MatrixOptimizer
from .split import (
    CONVOLUTIONS,
    EMBEDDING,
    LIKE_EMBEDDING,
    NAMED,
    NOT_HIDDEN,
    SIDE,
    Assigned,
    assign,
    grouped,
)

# Path component of a fused weight -> the number of matrices along dim 0. "query_key_value" is left
# out: some libraries order its rows by heads, others by q, k and v.
FUSED = {"qkv": 3, "Wqkv": 3, "c_attn": 3, "qkv_proj": 3, "kv_proj": 2, "gate_up_proj": 2, "w12": 2}
# Beginnings of classes of transformers -> their weight whose rows are in another order: by heads or
# blocks, or one projection that is both key and value.
UNLIKE = {
    "CodeGen": "qkv_proj", "GPTBigCode": "c_attn", "MiniMaxLightning": "qkv_proj",
    "DeepseekV4": "kv_proj",
}  # fmt: skip


def configure(
    model: nn.Module,
    optimizer: str = "Muon",
    *,
    names: Sequence[str] = NOT_HIDDEN,
    heads: Mapping[str, int | Sequence[int]] | None = None,
    split: Mapping[str, Sequence[int] | None] | None = None,
    report: Callable[[str], Any] | None = print,
    **settings: Any,
) -> MatrixOptimizer:
    """Return an optimizer for a model: `split_params`, plus what is usual for its kind of model.

    It serves transformers (dense, MoE, MLA), ConvNets and MLPs. Matrices are hidden weights,
    convolutions (out x rest), expert stacks (batches), routers and low-rank projections. Weights
    with a name in FUSED are split: into q, k, v if they have three times as many rows as columns,
    into two (as gate, up) if their number of rows is even; layers in UNLIKE are not. Stacks of gate
    and up are split if `down_proj` beside them shows that their rows are both. Embeddings, vectors
    and heads go to AdamW. If no matrix goes there by its name or by an embedding's type or shape,
    the last Linear or convolution is taken for the head. It is not, if `names` are given.

    Args:
        model: all its parameters that require gradients are updated, each once.
        optimizer: a class name of `orthonorm.optim`, in any case: "normuon", "SOAP".
        names, heads, split: as split_params' adamw, heads and split; they take precedence.
        report: function that gets the report as a string, or None.
        **settings: the class's own (`lr`, `adamw=dict(lr=...)`, ...).

    Raises: ValueError or TypeError for an unknown class, `heads` or `split` patterns that match
    nothing, or settings that the class does not take.
    """
    cls = by_name(optimizer)
    found = routed(model, names, heads, split)
    groups = grouped(found)
    if cls is AdamW:
        groups = [{"params": [(a.name, a.p) for a in found]}]
    made = cls(groups, **settings)
    if report is not None:
        report(describe(found, made))
    return made


def routed(
    model: nn.Module,
    adamw: Sequence[str] = NOT_HIDDEN,
    heads: Mapping[str, int | Sequence[int]] | None = None,
    split: Mapping[str, Sequence[int] | None] | None = None,
) -> list[Assigned]:
    """Return what `split_params` assigns, with a last layer for AdamW and fused weights split."""
    found = assign(model, adamw=adamw, heads=heads, split=split)
    told = (NAMED, EMBEDDING, LIKE_EMBEDDING)
    outside = any(a.reason.startswith(told) and a.p.dim() > 1 for a in found)
    if adamw is NOT_HIDDEN and not outside:
        found = without_last(found)
    holders = {
        id(m): type(holder).__name__ for holder in model.modules() for m in holder.children()
    }
    return [pieces(a, holders.get(id(a.owner), "")) for a in found]


def by_name(name: object) -> type[MatrixOptimizer]:
    """Return an optimizer class by its name in any case; a class is returned as it is."""
    if isinstance(name, type) and issubclass(name, MatrixOptimizer):
        return name
    known = {key.lower(): cls for key, cls in REGISTRY.items()}
    if not isinstance(name, str) or name.lower() not in known:
        raise ValueError(
            f"orthonorm.optim: optimizer must be one of {sorted(REGISTRY)}, got {name!r}"
        )
    return known[name.lower()]


def without_last(found: list[Assigned]) -> list[Assigned]:
    """Give the last weight of a Linear or convolution to AdamW, unless it is the only one.

    A last layer with a single output is there already.
    """
    kinds = (nn.Linear, *CONVOLUTIONS)
    layers = [i for i, a in enumerate(found) if a.p.dim() > 1 and isinstance(a.owner, kinds)]
    weights = [i for i in layers if not found[i].reason]
    if len(weights) > 1 and found[layers[-1]].reason != SIDE:
        last = weights[-1]
        found[last] = found[last]._replace(reason="last layer", keys={})
    return found


def pieces(a: Assigned, holder: str = "") -> Assigned:
    """Add the split of a fused weight, if its name and shape are those of one.

    `holder` is the class of the module that has its layer.
    """
    part = next((part for part in a.name.split(".") if part in FUSED), "")
    if a.reason or not part or a.keys.keys() & {"flatten", "split", "heads"}:
        return a
    if any(holder.startswith(kind) and part == name for kind, name in UNLIKE.items()):
        return a
    if "lora_a" in a.name.lower():  # of the rows of B A, B's are fused
        return a
    count = FUSED[part]
    *stack, rows, columns = a.p.mT.shape if "transpose" in a.keys else a.p.shape
    if len(stack) > 1 or not fused(a, count, rows, columns):
        return a
    return a._replace(keys={**a.keys, "split": (rows // count,) * count})


def fused(a: Assigned, count: int, rows: int, columns: int) -> bool:
    """True if the rows of a weight, or of every matrix of a stack, are `count` matrices' rows."""
    if a.p.dim() == 2:
        return rows % 2 == 0 if count == 2 else rows == 3 * columns
    down = getattr(a.owner, "down_proj", None)
    if count != 2 or not isinstance(down, nn.Parameter) or rows % 2:
        return False
    turns = type(a.owner).__name__.startswith("GptOss")  # gate and up take turns
    if not getattr(a.owner, "is_concatenated", not turns):
        return False
    shape = (down.mT if "transpose" in a.keys else down).shape
    return shape[1:] == (columns, rows // 2)


def describe(found: list[Assigned], optimizer: MatrixOptimizer) -> str:
    """Return the report: a line per kind of weight, with rule, count, shape and view or reason."""
    lines: dict[tuple[Any, ...], int] = {}
    totals = {"matrix": 0, "adamw": 0}
    for a in found:
        rule = "adamw" if a.reason or isinstance(optimizer, AdamW) else "matrix"
        how = a.reason or ", ".join(f"{k}={v}" for k, v in a.keys.items()) or kind(a)
        name = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", a.name)
        key = (rule, name, tuple(a.p.shape), how)
        lines[key] = lines.get(key, 0) + 1
        totals[rule] += a.p.numel()
    text = []
    for rule, title in (("matrix", optimizer.name), ("adamw", "AdamW")):
        if totals[rule]:
            text.append(f"{title}: {totals[rule]:,} parameters")
        for (r, name, shape, how), count in lines.items():
            if r == rule:
                size = "x".join(map(str, shape)) or "scalar"
                text.append(f"  {name:40} {count:4} of {size:16} {how}")
    return "\n".join(text)


def kind(a: Assigned) -> str:
    """Return in a word how a weight without view keys becomes matrices."""
    if a.p.dim() > 3:
        return "flattened"
    return "batch" if a.p.dim() == 3 else "matrix"
