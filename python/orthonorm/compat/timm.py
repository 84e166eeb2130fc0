"""timm: its optimizer factory with the optimizers of `orthonorm.optim`.

    from orthonorm.compat.timm import create_optimizer_v2  # was: from timm.optim import ...

timm need not be installed. Source: https://github.com/huggingface/pytorch-image-models 1.0.31.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..optim import AdamW, MatrixOptimizer
from ..optim.configure import by_name
from ..optim.split import NOT_HIDDEN
from .factory import groups_of

__all__ = [
    "create_optimizer_v2",
]


def create_optimizer_v2(
    model_or_params: Any,
    opt: str = "muon",
    lr: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    foreach: bool | None = None,
    filter_bias_and_bn: bool = True,
    fallback_list: Collection[str] = (),
    fallback_no_weight_decay: bool = False,
    layer_decay: float | None = None,
    layer_decay_min_scale: float = 0.0,
    layer_decay_no_opt_scale: float | None = None,
    param_group_fn: Callable[[nn.Module], Any] | None = None,
    **kwargs: Any,
) -> MatrixOptimizer:
    """Make the optimizer `opt` for a model, with the arguments of timm's function.

    Args:
        model_or_params: an nn.Module, which `split_params` groups; or parameters or param groups.
            Of a module, the parameters of get_classifier() (which timm's models have) go to AdamW.
        opt: a name of `orthonorm.optim`, in upper or lower case.
        lr: learning rate of matrices; None takes the optimizer's default. AdamW's is
            `adamw=dict(lr=...)`, by default 3e-4.
        weight_decay: of all parameters except those that the model's no_weight_decay() names, and
            except vectors if `filter_bias_and_bn`; of AdamW's alone if the rule takes none (Scion).
        momentum: used by optimizers that have it.
        foreach: has no effect here, because all steps are fused.
        filter_bias_and_bn: True exempts vectors from weight decay.
        fallback_list: name patterns of further parameters that AdamW takes.
        fallback_no_weight_decay: True gives AdamW the parameters that no_weight_decay() names.
        layer_decay: must be None; for learning rates by layer use `param_group_fn`.
        layer_decay_min_scale, layer_decay_no_opt_scale: have no effect here.
        param_group_fn: function that makes the groups of a model in place of `split_params`.
        **kwargs: arguments of the optimizer. `betas` and `eps` go to AdamW if the optimizer's rule
            has no betas.
    """
    if layer_decay is not None:
        raise ValueError(
            f"create_optimizer_v2: layer_decay must be None (use param_group_fn), got {layer_decay}"
        )
    cls = by_name(opt)
    groups = model_or_params
    if isinstance(groups, nn.Module):
        exempt = set(getattr(groups, "no_weight_decay", set)())
        if param_group_fn is not None:
            groups = param_group_fn(groups)
        else:
            fallback = {*fallback_list, *(exempt if fallback_no_weight_decay else ())}
            fallback |= _classifier(groups)
            groups = _grouped(groups, cls, weight_decay, exempt, fallback, filter_bias_and_bn)
    takes = inspect.signature(cls).parameters
    settings = {"weight_decay": weight_decay, **kwargs} if "weight_decay" in takes else kwargs
    adam = {"weight_decay": weight_decay}
    if lr is not None:
        settings["lr"] = lr
    if "momentum" in takes:
        settings.setdefault("momentum", momentum)
    if "betas" not in takes:
        adam |= {key: settings.pop(key) for key in ("betas", "eps") if key in settings}
    if not issubclass(cls, AdamW):
        settings["adamw"] = {**adam, **(settings.get("adamw") or {})}
    return cls(groups, **settings)


def _classifier(model: nn.Module) -> set[str]:
    """Return the names of parameters of get_classifier(): one module, or one for each head."""
    classifier: Any = getattr(model, "get_classifier", tuple)()
    heads = (classifier,) if isinstance(classifier, nn.Module) else classifier
    own = {id(p) for head in heads for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


def _grouped(
    model: nn.Module,
    cls: type[MatrixOptimizer],
    weight_decay: float,
    exempt: set[str],
    fallback: set[str],
    vectors_exempt: bool,
) -> list[dict[str, Any]]:
    """Return param groups of the model, one for each pair of rule and weight decay."""
    takes = inspect.signature(cls).parameters
    groups: list[dict[str, Any]] = []
    for group in groups_of(model, cls, adamw=NOT_HIDDEN):
        sorts: dict[tuple[bool, bool], list[Any]] = {}
        for name, p in group["params"]:
            free = (vectors_exempt and p.dim() < 2) or any(fnmatchcase(name, x) for x in exempt)
            given = group.get("rule") == "matrix" and any(fnmatchcase(name, x) for x in fallback)
            sorts.setdefault((free, given), []).append((name, p))
        for (free, given), params in sorts.items():
            keys = {k: v for k, v in group.items() if k != "params"}
            if given:
                keys = {"rule": "adamw"}
            if keys.get("rule") == "adamw" or "weight_decay" in takes:
                keys["weight_decay"] = 0.0 if free else weight_decay
            groups.append({**keys, "params": params})
    return groups
