"""What tests of `configure` ask of it."""

from __future__ import annotations

from typing import Any

from orthonorm import optim
from torch import nn


def matrices_of(model: nn.Module) -> dict[str, Any]:
    """Return the split, or None, of each parameter that the matrix rule takes."""
    opt = optim.configure(model, "muon", lr=0.02, report=None)
    return {n: g["split"] for g in opt.param_groups if g["rule"] == "matrix"
            for n in g["param_names"]}  # fmt: skip
