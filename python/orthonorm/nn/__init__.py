"""Norm control in layers: spectral normalization and its relatives, Lipschitz caps, bounds,
whitening and orthonormal parameters."""

from .constraints import after_step, constrain_, spectral_init_, spectral_scale
from .convolution import ConvOperator, conv_spectral_norm
from .gram import (
    SpectralRescaling,
    conv_circular_bound,
    conv_rescaling,
    conv_zero_bound,
    gram_rescaling,
    layer_bound,
    norm_penalty,
    spectral_rescale,
)
from .jacobian import jacobian_nuclear_penalty, jacobian_square
from .lipschitz import (
    clipped_decay,
    embed_cap,
    hard_cap,
    soft_cap,
    soft_cap_strength,
    spectral_clip,
    spectral_decay,
    spectral_hammer,
    spectral_normalize,
    stiefel,
)
from .low_rank import nuclear_norm, orthonormalize_lora, star
from .manifolds import grassmann_logits, grassmann_tangent, polar_retraction, stiefel_tangent
from .normalized import SpectralNorm
from .reparam import (
    SigmaReparam,
    StableRank,
    sigma_reparam,
    sigma_reparam_,
    stable_rank_norm,
    stable_rank_norm_,
)
from .report import LipschitzReport, lipschitz_report
from .rotations import cayley_rotation, renormalize_columns_, spectral_rotation
from .spectral_norm import refresh_vectors_, remove_spectral_norm, spectral_norm, spectral_norm_
from .stable_rank_conv import StableRankConv
from .whitening import IterNorm, intl_loss, iter_norm, trace_loss

__all__ = [
    "ConvOperator",
    "IterNorm",
    "LipschitzReport",
    "SigmaReparam",
    "SpectralNorm",
    "SpectralRescaling",
    "StableRank",
    "StableRankConv",
    "after_step",
    "cayley_rotation",
    "clipped_decay",
    "constrain_",
    "conv_circular_bound",
    "conv_rescaling",
    "conv_spectral_norm",
    "conv_zero_bound",
    "embed_cap",
    "gram_rescaling",
    "grassmann_logits",
    "grassmann_tangent",
    "hard_cap",
    "intl_loss",
    "iter_norm",
    "jacobian_nuclear_penalty",
    "jacobian_square",
    "layer_bound",
    "lipschitz_report",
    "norm_penalty",
    "nuclear_norm",
    "orthonormalize_lora",
    "polar_retraction",
    "refresh_vectors_",
    "remove_spectral_norm",
    "renormalize_columns_",
    "sigma_reparam",
    "sigma_reparam_",
    "soft_cap",
    "soft_cap_strength",
    "spectral_clip",
    "spectral_decay",
    "spectral_hammer",
    "spectral_init_",
    "spectral_norm",
    "spectral_norm_",
    "spectral_normalize",
    "spectral_rescale",
    "spectral_rotation",
    "spectral_scale",
    "stable_rank_norm",
    "stable_rank_norm_",
    "star",
    "stiefel",
    "stiefel_tangent",
    "trace_loss",
]
