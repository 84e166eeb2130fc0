"""Run torch.optim.Muon on these kernels, by replacing the function that its step calls."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon

from .. import _checks as check
from ..ops import muon_step_
from ..optim.settings import ADJUST
from ..optim.tensors import is_distributed
from ..polar import polynomial

KNOWN = ((2, 10), (2, 14))  # torch/optim/_muon.py was read in 2.10.0 to 2.14.1 (2026-11)
ORIGINAL = _muon.muon


class Patch:
    """The patch of torch.optim.Muon; `undo()` or leaving the `with` block takes it back."""

    def __init__(self) -> None:
        self.made = _muon.muon is not muon
        _muon.muon = muon

    def undo(self) -> None:
        """Restore torch's own step; do nothing if another patch was already in place."""
        if self.made:
            _muon.muon = ORIGINAL
            self.made = False

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def patch_torch_muon() -> Patch:
    """W <- (1 - lr wd) W - lr s polar(U) by `ops.muon_step_` in every torch.optim.Muon from now on.

    Applies to optimizers made before and after. Their arguments and state dicts stay the same; a
    step becomes one call for all matrices of a group. DTensor parameters keep torch's step
    (`orthonorm.optim.Muon` divides their work among ranks).

    Returns: a `Patch`, which is undone by `undo()` or as a context manager. Patching a second time
    changes nothing.

    Raises: RuntimeError for a version of torch whose Muon is not known to compute this formula.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not KNOWN[0] <= version <= KNOWN[1]:
        low, high = (".".join(map(str, v)) for v in KNOWN)
        raise RuntimeError(
            f"patch_torch_muon: torch must be {low} to {high}, whose Muon is known, got "
            f"{torch.__version__}; orthonorm.optim.Muon takes its arguments"
        )
    return Patch()


def muon(
    params: list[Tensor],
    grads: list[Tensor],
    muon_momentum_bufs: list[Tensor],
    *,
    foreach: bool | None = None,
    lr: Any,
    weight_decay: Any,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None,
    has_complex: bool,
) -> None:
    """Take the place of torch's functional Muon; lists and arguments are the same.

    adjust_lr_fn may be any name of `optim.settings.ADJUST`.
    """
    settings = dict(
        lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, eps=eps,
        ns_coefficients=ns_coefficients, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
    )  # fmt: skip
    if has_complex or foreach or any(is_distributed(p) for p in params):
        ORIGINAL(
            params, grads, muon_momentum_bufs, foreach=foreach, has_complex=has_complex, **settings
        )
        return
    if not params:
        return
    check.choice("torch.optim.Muon", "adjust_lr_fn", adjust_lr_fn, (None, *ADJUST))
    device = params[0].device
    # numbers become tensors by a product, so torch.compile does not recompile for each value
    one = torch.ones((), dtype=torch.float64, device=device)
    rates = (x.reshape(()) if isinstance(x, Tensor) else x for x in (lr, momentum, weight_decay))
    p = polynomial(ns_coefficients, ns_steps, device=device)
    s = ADJUST[adjust_lr_fn or "original"]
    muon_step_.overload(
        params, grads, muon_momentum_bufs, *(one * x for x in rates),
        [s(*w.shape) for w in params], p.coefficients, p.restarts, nesterov, "auto", p.precision,
        p.scale, eps, p.safety,
    )  # fmt: skip
    torch.autograd.graph.increment_version(params)
