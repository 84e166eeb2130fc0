"""Other libraries' functions and classes on these kernels: change one import, keep the code.

| in place of | import from |
|---|---|
| `torch.optim.Muon`, wherever it is used | `patch_torch_muon()`, here |
| KellerJordan/Muon, `import muon` | `orthonorm.compat.muon` |
| KellerJordan/modded-nanogpt | `orthonorm.compat.modded_nanogpt` |
| microsoft/dion | `orthonorm.compat.dion` |
| NVIDIA-NeMo/Emerging-Optimizers (Megatron) | `orthonorm.compat.emerging_optimizers` |
| Dao-AILab/gram-newton-schulz | `orthonorm.compat.gram_newton_schulz` |
| Hugging Face Trainer's optimizer | `orthonorm.compat.transformers` |
| timm's `create_optimizer_v2` | `orthonorm.compat.timm` |
| torchtitan's `OptimizersContainer` | `orthonorm.compat.torchtitan` |

accelerate and Lightning need nothing: an optimizer of `orthonorm.optim` is one torch Optimizer.

The drop-in functions have the names, parameters and result dtypes of the originals. They compute
the same formulas, in the dtypes that `orthonorm.polar` picks. Inputs stay unmodified, except
buffers that the original updates too.
"""

from .torch_muon import patch_torch_muon

__all__ = ["patch_torch_muon"]
