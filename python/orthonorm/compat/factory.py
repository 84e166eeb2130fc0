"""Make an optimizer of a model by its name; the modules for frameworks share these functions."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..optim import AdamW, MatrixOptimizer
from ..optim.configure import by_name, routed
from ..optim.split import grouped


def groups_of(model: nn.Module, cls: type[MatrixOptimizer], **options: Any) -> list[dict[str, Any]]:
    """Return param groups as `optim.configure` makes them.

    AdamW has no matrix rule: one group has all parameters that require gradients, with their names.
    """
    if issubclass(cls, AdamW):
        return [{"params": [(n, p) for n, p in model.named_parameters() if p.requires_grad]}]
    return grouped(routed(model, **options))


def create_optimizer(
    model: Any,
    optimizer: str | type[MatrixOptimizer] = "Muon",
    *,
    split_options: dict[str, Any] | None = None,
    **settings: Any,
) -> MatrixOptimizer:
    """Make the named optimizer for a model: matrices by its rule, the rest by AdamW.

    Args:
        model: an nn.Module; or parameters or param groups, which are taken as they are.
        optimizer: a name of `orthonorm.optim`, in upper or lower case, or a class of it.
        split_options: arguments of `split_params`: `adamw` patterns, `heads`, `split`.
        **settings: arguments of the optimizer.
    """
    cls = by_name(optimizer)
    if isinstance(model, nn.Module):
        model = groups_of(model, cls, **(split_options or {}))
    return cls(model, **settings)
