"""The optimizers that the example compares: a builder for each, and a table of names."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from orthonorm.examples.config import PAPER_PRESETS, UsageError
from orthonorm.examples.model import hidden_matrices
from orthonorm.optim import REGISTRY, AdamW, Conda, Muon, split_params
from torch import nn
from torch.optim import Optimizer

Settings = dict[str, Any]  # keyword arguments of a builder; JSON values

TUNED = Path(__file__).with_name("tuned.json")

# github.com/jie040109/Conda, examples/llama/scripts at 449af713 (60M, 130M and 350M; its 1B runs
# add weight decay 0.1 and clipping at 1 to the baselines).
PAPER_SETTINGS: dict[str, Settings] = {
    "adamw": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0},
    "muon": {
        "lr": 1e-3, "adamw_lr": 1e-3, "momentum": 0.95, "weight_decay": 0.0,
        "adjust_lr_fn": "match_rms_adamw",
    },
    "conda": {
        "lr": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.0, "update_proj_gap": 2000,
        "scale": 0.25,
    },
}  # fmt: skip


def torch_adamw(
    model: nn.Module, *, lr: float, betas: Sequence[float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> Optimizer:  # fmt: skip
    """Make torch's fused AdamW for all parameters."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True
    )


def torch_muon(
    model: nn.Module, *, lr: float, adamw_lr: float, momentum: float = 0.95,
    weight_decay: float = 0.1, adjust_lr_fn: str | None = None,
) -> Optimizer:  # fmt: skip
    """Make torch's Muon for the hidden matrices, with torch's AdamW for the rest."""
    hidden = hidden_matrices(model)
    rest = [parameter for name, parameter in model.named_parameters() if name not in hidden]
    muon = torch.optim.Muon(
        hidden.values(), lr=lr, momentum=momentum, weight_decay=weight_decay,
        adjust_lr_fn=adjust_lr_fn,
    )  # fmt: skip
    adamw = torch.optim.AdamW(
        rest, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )
    return Together(muon, adamw)


def adamw(
    model: nn.Module, *, lr: float, betas: Sequence[float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> Optimizer:  # fmt: skip
    """Make orthonorm's AdamW for all parameters."""
    return AdamW(model.parameters(), lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)


def muon(
    model: nn.Module, *, lr: float, adamw_lr: float, momentum: float = 0.95,
    weight_decay: float = 0.1, adjust_lr_fn: str | None = None,
) -> Optimizer:  # fmt: skip
    """Make orthonorm's Muon for the hidden matrices, with AdamW for the rest, as one optimizer."""
    return Muon(
        split_params(model), lr=lr, momentum=momentum, weight_decay=weight_decay,
        adjust_lr_fn=adjust_lr_fn,
        adamw={"lr": adamw_lr, "betas": (0.9, 0.95), "weight_decay": weight_decay},
    )  # fmt: skip


def conda(
    model: nn.Module, *, lr: float, betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0, update_proj_gap: int = 2000, scale: float = 0.25,
) -> Optimizer:  # fmt: skip
    """Make orthonorm's Conda: Adam in the singular basis of the momentum.

    AdamW takes the rest at the same learning rate.
    """
    return Conda(
        split_params(model), lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay,
        update_proj_gap=update_proj_gap, scale=scale,
    )  # fmt: skip


BUILDERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
    "conda": conda,
    "torch-adamw": torch_adamw,
    "torch-muon": torch_muon,
}


def build_optimizer(name: str, model: nn.Module, lr: float, **settings: Any) -> Optimizer:
    """Make the optimizer `name` for all parameters of `model`; `settings` as in tuned.json.

    A name of `orthonorm.optim.REGISTRY` gets the groups of `split_params` and takes the arguments
    of its class.
    """
    if name in BUILDERS:
        return BUILDERS[name](model, lr=lr, **settings)
    params = model.parameters() if name == "AdamW" else split_params(model)
    return REGISTRY[name](params, lr=lr, **settings)


def default_settings(name: str, preset: str, tuned: Path = TUNED) -> Settings:
    """Return the settings of tuned.json, or of the Conda paper for the paper's sizes.

    torch's implementations get the settings of ours, because the rules are the same.
    """
    rule = name.removeprefix("torch-")
    if preset in PAPER_PRESETS:
        return dict(PAPER_SETTINGS[rule])
    try:
        return dict(json.loads(tuned.read_text())["settings"][rule])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--tuned must be a file written by --sweep with settings for {rule}, got {tuned} "
            f"({type(error).__name__}: {error})"
        ) from None


class Together(Optimizer):
    """Several optimizers that step, schedule and checkpoint as one; they share param groups."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state dicts of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`; loading makes new param groups, which are then shared again."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
