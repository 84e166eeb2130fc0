"""Hugging Face transformers 5 and later: the Trainer's argument `optimizer_cls_and_kwargs`.

    Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs("Muon", lr=0.02), ...)

Schedules, clipping, accumulation and checkpoints stay with the Trainer: it gets one torch
Optimizer.
"""

from __future__ import annotations

from typing import Any

from ..optim import MatrixOptimizer
from ..optim.configure import by_name
from .factory import create_optimizer

__all__ = [
    "OptimizerFactory",
    "optimizer_cls_and_kwargs",
]


class OptimizerFactory:
    """A factory that the Trainer constructs, then calls with the model to get the optimizer."""

    def __call__(self, model: Any, **settings: Any) -> MatrixOptimizer:
        return create_optimizer(model, **settings)


def optimizer_cls_and_kwargs(
    optimizer: str | type[MatrixOptimizer] = "Muon", **settings: Any
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """Return the pair for `Trainer(optimizer_cls_and_kwargs=...)`; groups by `split_params(model)`.

    Args:
        optimizer: a name of `orthonorm.optim`, in upper or lower case, or a class of it.
        **settings: arguments of the optimizer; `split_options` has those of `split_params`.
            Learning rates come from here: lr and adamw=dict(lr=...). The learning_rate,
            weight_decay and adam_* of TrainingArguments are not used.
    """
    return OptimizerFactory, {"optimizer": by_name(optimizer), **settings}
