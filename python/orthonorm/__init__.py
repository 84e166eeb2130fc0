"""orthonorm: fused, batched kernels for matrix optimizers.

Three families, each a torch custom op with Triton, CUDA C++ and CPU C++ kernels behind it:
orthogonalize (Newton-Schulz iterations), normalize (second moments) and spectral norms.
"""

from pathlib import Path

from . import ops
from ._library import LOADED, OPS, reference
from ._version import __version__



LOADED.load(Path(__file__).parent)

__all__ = ["OPS", "__version__", "ops", "reference"]
