"""Drop-in optimizers: matrix rules and their AdamW companion in one torch.optim.Optimizer."""

from .adamw import AdamW
from .base import REGISTRY, Batch, MatrixOptimizer
from .conda import Conda
from .muon import Muon
from .split import split_params

__all__ = ["REGISTRY", "AdamW", "Batch", "Conda", "MatrixOptimizer", "Muon", "split_params"]
