"""Drop-in optimizers: matrix rules and their AdamW companion in one torch.optim.Optimizer."""

from .adago import AdaGO
from .adamuon import AdaMuon
from .adamw import AdamW
from .auon import AuON, HybridAuON
from .base import REGISTRY, MatrixOptimizer
from .conda import Conda
from .configure import configure
from .convert import convert_state_dict
from .dion import Dion
from .dion2 import Dion2
from .muon import Muon
from .muoneq import MuonEq
from .normuon import NorMuon
from .orthogonal import (
    NewtonSchulz as NewtonSchulz,
)  # not in __all__: pdoc loses its inherited keys
from .polargrad import PolarGrad
from .qk_clip import observe_logits_, qk_clip_, qk_clip_after_step
from .scale import SCALE
from .scion import Scion, ScionLight
from .settings import Common
from .shampoo import Shampoo
from .signum import Signum
from .soap import SOAP
from .split import split_params
from .splus import SPlus
from .sso import SSO
from .state import Batch, Updates
from .steepest import SteepestDescent
from .stiefel_adam import StiefelAdam
from .swan import SWAN
from .trust_region import TrustRegion

__all__ = [
    "REGISTRY",
    "SCALE",
    "SOAP",
    "SSO",
    "SWAN",
    "AdaGO",
    "AdaMuon",
    "AdamW",
    "AuON",
    "Batch",
    "Common",
    "Conda",
    "Dion",
    "Dion2",
    "HybridAuON",
    "MatrixOptimizer",
    "Muon",
    "MuonEq",
    "NorMuon",
    "PolarGrad",
    "SPlus",
    "Scion",
    "ScionLight",
    "Shampoo",
    "Signum",
    "SteepestDescent",
    "StiefelAdam",
    "TrustRegion",
    "Updates",
    "configure",
    "convert_state_dict",
    "observe_logits_",
    "qk_clip_",
    "qk_clip_after_step",
    "split_params",
]
