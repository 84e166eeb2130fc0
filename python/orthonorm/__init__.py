"""orthonorm: fused, batched kernels for matrix optimizers.

Three families, each a torch custom op with Triton, CUDA C++ and CPU C++ kernels behind it:
orthogonalize (Newton-Schulz iterations), normalize (second moments) and spectral norms.
"""

from pathlib import Path

from . import coefficients, ops
from ._library import LOADED, OPS, reference
from ._version import __version__
from .exact import PolarExact, polar_exact
from .polar import odd_polynomial, polar
from .spectral import gram_iteration, power_iteration, spectral_norm

LOADED.load(Path(__file__).parent)

__all__ = [
    "LOADED",
    "OPS",
    "PolarExact",
    "__version__",
    "coefficients",
    "gram_iteration",
    "odd_polynomial",
    "ops",
    "polar",
    "polar_exact",
    "power_iteration",
    "reference",
    "spectral_norm",
]
