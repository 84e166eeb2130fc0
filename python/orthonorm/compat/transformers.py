"""Hugging Face transformers: `optimizer_cls_and_kwargs` of the Trainer (transformers 5 and later).

    Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs("Muon", lr=0.02), ...)

Schedules, clipping, accumulation and checkpoints are the Trainer's own, on one torch Optimizer.
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
    """What the Trainer makes, then calls with the model: it is no class of optimizers."""

    def __call__(self, model: Any, **settings: Any) -> MatrixOptimizer:
        return create_optimizer(model, **settings)


def optimizer_cls_and_kwargs(
    optimizer: str | type[MatrixOptimizer] = "Muon", **settings: Any
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """The pair for `Trainer(optimizer_cls_and_kwargs=...)`: the optimizer on `split_params(model)`.

    Args:
        optimizer: a name of `orthonorm.optim`, in any case, or a class of it.
        **settings: of the optimizer, and `split_options` of `split_params`. Learning rates
            come from here, lr and adamw=dict(lr=...); TrainingArguments.learning_rate,
            weight_decay and adam_* are not used.
    """
    return OptimizerFactory, {"optimizer": by_name(optimizer), **settings}
