"""Every op: its schema, its meaning and its definition in plain torch, one family per file.

Each name is an `Op`. Call it (`ops.gram(X)`), run its definition (`ops.gram.reference(X)`), or use
the bare torch op (`torch.ops.orthonorm.gram`).

`spectral_norm` and `gram_iteration` have gradients. Backward through the results of other ops
raises NotImplementedError in eager mode; compiled calls and bare torch ops only warn.
"""

from .blocks import dequantize_blocks_, quantize_blocks_
from .coded_steps import coded_adamw_step_
from .light_steps import mean_sinh_square, normalize_columns_, signum_step_
from .newton_schulz import (
    newton_schulz,
    newton_schulz_,
    scaled_polynomial_,
    small_newton_schulz,
)
from .normalize import (
    column_moment_,
    column_normalize,
    elementwise_moment_,
    factored_moment_,
    rotated_adam_,
    row_moment_,
    row_normalize,
)
from .passes import adamw_step_, decayed_update_, muon_prologue_, sign_
from .polar_iteration import polar_iteration
from .rotations import rotate_, rotate_back_
from .rows import accumulate_, take_rows_, update_rows_
from .scaling import divide_each, inner, magnitude
from .spectral import gram_iteration, power_iteration_, spectral_norm
from .spectral_normalization import spectral_normalization_, spectral_normalization_gradient
from .steps import conda_step_, muon_step_, normuon_step_
from .words import (
    apply,
    direct_polynomial,
    gram,
    gram_form,
    gram_polynomial,
    gram_update_,
    symmetric_update,
)

__all__ = [
    "accumulate_",
    "adamw_step_",
    "apply",
    "coded_adamw_step_",
    "column_moment_",
    "column_normalize",
    "conda_step_",
    "decayed_update_",
    "dequantize_blocks_",
    "direct_polynomial",
    "divide_each",
    "elementwise_moment_",
    "factored_moment_",
    "gram",
    "gram_form",
    "gram_iteration",
    "gram_polynomial",
    "gram_update_",
    "inner",
    "magnitude",
    "mean_sinh_square",
    "muon_prologue_",
    "muon_step_",
    "newton_schulz",
    "newton_schulz_",
    "normalize_columns_",
    "normuon_step_",
    "polar_iteration",
    "power_iteration_",
    "quantize_blocks_",
    "rotate_",
    "rotate_back_",
    "rotated_adam_",
    "row_moment_",
    "row_normalize",
    "scaled_polynomial_",
    "sign_",
    "signum_step_",
    "small_newton_schulz",
    "spectral_norm",
    "spectral_normalization_",
    "spectral_normalization_gradient",
    "symmetric_update",
    "take_rows_",
    "update_rows_",
]
