"""Drop-in optimizers: matrix rules and their AdamW companion in one torch.optim.Optimizer."""

from .adamuon import AdaMuon
from .adamw import AdamW
from .base import REGISTRY, MatrixOptimizer
from .conda import Conda
from .muon import Muon
from .normuon import NorMuon
from .scion import Scion, ScionLight
from .shampoo import Shampoo
from .signum import Signum
from .soap import SOAP
from .split import split_params
from .state import Batch, Updates
from .trust_region import TrustRegion

__all__ = [
    "REGISTRY",
    "SOAP",
    "AdaMuon",
    "AdamW",
    "Batch",
    "Conda",
    "MatrixOptimizer",
    "Muon",
    "NorMuon",
    "Scion",
    "ScionLight",
    "Shampoo",
    "Signum",
    "TrustRegion",
    "Updates",
    "split_params",
]
