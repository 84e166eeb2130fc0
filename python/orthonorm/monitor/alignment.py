"""Spectral Alignment: cosines between a layer's inputs and its top singular direction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .. import ops
from ..ops.normalize import accumulator


class Alignment(NamedTuple):
    """Result of `spectral_alignment`: the cosines, |their mean|, and the diversity of signs."""

    cosines: Tensor
    mean: Tensor
    diversity: Tensor


def spectral_alignment(W: Tensor, X: Tensor, v: Tensor | None = None, steps: int = 32) -> Alignment:
    """s_i = cos(x_i, v_1), v_1 the top right singular vector of W, for the inputs of y = W x.

    Healthy inputs have cosines of both signs. A collapse to one sign, where diversity falls to 0,
    comes before an explosion of the loss. The sign of v_1 is arbitrary, and so is the common sign
    of all s_i.

    Args:
        W: (m, n), a layer's weight.
        X: (..., n), its inputs.
        v: v_1 (n,) at any scale, if it is known; None finds it by `steps` power steps.
        steps: power steps, used if v is None.

    Returns:
        cosines: (...), 0 for a zero input.
        mean: |mean of the cosines|, ().
        diversity: 2 min(share of s_i > 0, share of s_i < 0), (); 1: balanced, 0: one sign.

    Cost: one pass over X, and the power steps. Source: arXiv:2510.04202.
    """
    name = "spectral_alignment"
    check.tensor(name, "W", W, min_dim=2)
    check.tensor(name, "X", X, min_dim=1)
    if W.dim() != 2 or X.shape[-1] != W.shape[1]:
        raise ValueError(
            f"{name}: W must be (m, n) and X (..., n), got {tuple(W.shape)} and {tuple(X.shape)}"
        )
    if v is None:
        v = ops.spectral_norm(W.detach(), steps)[2]
    check.tensor(name, "v", v)
    check.equal_shape(name, "v", v, (W.shape[1],))
    dtype = accumulator(W, X)
    A, v = X.detach().to(dtype), v.detach().to(dtype)
    lengths = torch.linalg.vector_norm(A, dim=-1) * torch.linalg.vector_norm(v)
    cosines = torch.where(lengths == 0, 0.0, A @ v / lengths)
    positive, negative = ((side).to(dtype).mean() for side in (cosines > 0, cosines < 0))
    diversity = torch.where(
        cosines.isfinite().all(), 2 * torch.minimum(positive, negative), torch.nan
    )
    return Alignment(cosines, cosines.mean().abs(), diversity)


class AlignmentAlarm:
    """Alarm when diversity <= threshold, `patience` times in a row, in a layer once healthy.

    A layer is healthy at diversity >= `healthy`. One whose inputs have one sign from the start
    (behind a ReLU, for example) never was healthy and raises no alarm. After an alarm a layer
    raises the next one only once it has been healthy again.

    Args:
        threshold: largest 2 min(share positive, share negative) that counts as a collapse.
        healthy: diversity that arms the alarm.
        patience: measurements in a row at or below the threshold.

    Shapes: call it with a layer's name and one number. Cost: a comparison. Source:
    arXiv:2510.04202; the three defaults are a choice (examples/watch_spectra.py).
    """

    def __init__(self, threshold: float = 0.1, healthy: float = 0.3, patience: int = 2) -> None:
        name = "AlignmentAlarm"
        check.number(name, "threshold", threshold, 0.0, 1.0)
        check.number(name, "healthy", healthy, threshold, 1.0)
        check.integer(name, "patience", patience, 1)
        self.threshold, self.healthy, self.patience = threshold, healthy, patience
        self._armed: set[str] = set()
        self._low: dict[str, int] = {}

    def __call__(self, layer: str, diversity: float) -> bool:
        """Return True if this measurement of `layer` raises the alarm. NaN counts as collapse."""
        if diversity >= self.healthy:
            self._armed.add(layer)
        low = self._low.get(layer, 0) + 1 if not diversity > self.threshold else 0
        self._low[layer] = low
        if layer in self._armed and low >= self.patience:
            self._armed.discard(layer)
            return True
        return False
