"""State-dict names of spectral normalization: those of the parametrization and of the older hook.

parametrizations.weight.original   weight_orig
parametrizations.weight.0._u       weight_u
parametrizations.weight.0._v       weight_v
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class StateNames:
    """State-dict hooks of one weight: both namings load; `legacy` saves the older hook's names."""

    def __init__(self, name: str, dim: int, legacy: bool) -> None:
        self.name, self.dim, self.legacy = name, dim, legacy
        stem = f"parametrizations.{name}"
        self.names = {
            f"{name}_orig": f"{stem}.original",
            f"{name}_u": f"{stem}.0._u",
            f"{name}_v": f"{stem}.0._v",
        }

    def install(self, module: nn.Module) -> None:
        """Register the hooks on a module."""
        module.register_load_state_dict_pre_hook(self.load)
        if self.legacy:
            module.register_state_dict_post_hook(self)

    @classmethod
    def remove(cls, module: nn.Module, name: str) -> None:
        """Remove the hooks of the weight `name` from a module."""
        for hooks in (module._load_state_dict_pre_hooks, module._state_dict_hooks):
            for key, hook in list(hooks.items()):
                hook = getattr(hook, "hook", hook)
                owner = getattr(hook, "__self__", hook)
                if isinstance(owner, cls) and owner.name == name:
                    del hooks[key]

    def load(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rename, before loading, the older hook's entries to those of the parametrization."""
        if not parametrize.is_parametrized(module, self.name):
            return
        orig, u, v = (prefix + old for old in self.names)
        plain = prefix + self.name
        if orig in state and u in state and v not in state and plain in state:
            # torch before 1.2 saved W / sigma and u, but not v
            sigma = (state[orig] / state.pop(plain)).mean()
            state[v] = self._solved(state[orig], state[u], sigma)
        for old, new in self.names.items():
            if prefix + old in state:
                state[prefix + new] = state.pop(prefix + old)

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Rename, after saving, the parametrization's entries to those of the older hook."""
        for old, new in self.names.items():
            if prefix + new in state:
                state[prefix + old] = state.pop(prefix + new)
        metadata.setdefault("spectral_norm", {})[f"{self.name}.version"] = 1

    def _solved(self, weight: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
        """Return v with W v parallel to u and u^T W v = sigma; the oldest hook did not save v."""
        W = weight.movedim(self.dim, 0).flatten(1)
        v = torch.linalg.lstsq(W, u.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        return v * (sigma / (u @ W @ v))
