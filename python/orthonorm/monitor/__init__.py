"""Spectral monitors: metrics, matrix-free power iteration, a Monitor for training."""

from .alignment import Alignment, AlignmentAlarm, spectral_alignment
from .caches import cache_norms, kv_bits
from .growth import GrowthAlarm
from .guard import MonitorWarning
from .hessian import (
    Eigen,
    hessian_alignment,
    hessian_diagonal,
    hessian_gradient_product,
    hessian_product,
    top_hessian_eigenvalues,
)
from .iterations import Projected, StreamingEigenvector, projected_power_iteration
from .metrics import METRICS
from .norms import (
    frobenius,
    nuclear_norm,
    one_to_rms,
    rms_to_inf,
    rms_to_rms,
    sigma_1,
    singular_values,
)
from .ranks import (
    alpha_req,
    effective_rank,
    farms_alpha,
    hard_rank,
    matrix_nuclear_norm,
    rankme,
    soft_rank,
    spectral_concentration,
    stable_rank,
)
from .records import Row
from .scaling import WidthMatch, match_widths
from .tensors import SymmetricRankOnes, subspace_power_method
from .watch import Monitor

__all__ = [
    "METRICS",
    "Alignment",
    "AlignmentAlarm",
    "Eigen",
    "GrowthAlarm",
    "Monitor",
    "MonitorWarning",
    "Projected",
    "Row",
    "StreamingEigenvector",
    "SymmetricRankOnes",
    "WidthMatch",
    "alpha_req",
    "cache_norms",
    "effective_rank",
    "farms_alpha",
    "frobenius",
    "hard_rank",
    "hessian_alignment",
    "hessian_diagonal",
    "hessian_gradient_product",
    "hessian_product",
    "kv_bits",
    "match_widths",
    "matrix_nuclear_norm",
    "nuclear_norm",
    "one_to_rms",
    "projected_power_iteration",
    "rankme",
    "rms_to_inf",
    "rms_to_rms",
    "sigma_1",
    "singular_values",
    "soft_rank",
    "spectral_alignment",
    "spectral_concentration",
    "stable_rank",
    "subspace_power_method",
    "top_hessian_eigenvalues",
]
