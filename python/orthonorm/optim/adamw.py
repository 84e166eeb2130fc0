"""The optimizer AdamW."""

from __future__ import annotations

from typing import Any, ClassVar

from .base import MatrixOptimizer
from .settings import Rule, one_of
from .views import VIEW_DEFAULTS


class AdamW(MatrixOptimizer):
    """torch.optim.AdamW's update (defaults, order of operations, state names) as one fused pass.

    W <- (1 - lr wd) W - lr m^ / (sqrt(v^) + eps), fused over all parameters of a group.

    Args:
        params: parameters, named parameters or param groups. All use the AdamW rule: rule and views
            of the groups of `split_params` are ignored.
        lr: learning rate, a number or a one-element tensor.
        betas, eps, weight_decay: as torch.optim.AdamW; the decay may be a tensor, as lr.
        amsgrad: must be False.
        nonfinite: "propagate", "skip" (leave parameter and state, count in group["skipped"]) or
            "error".
        maximize: step along the gradient instead of against it.
        telemetry, mantissa, state_dtype, stochastic_rounding, foreach, fused, capturable,
            differentiable: see settings.Common.

    It loads state dicts of torch.optim.AdamW, and of torch.optim.Adam with decoupled_weight_decay;
    with amsgrad or L2 decay they are refused.

    State: `exp_avg`, `exp_avg_sq`, `step`; 8 bytes per parameter in float32. With mantissa=True
    bfloat16 parameters also have `mantissa`, 2 bytes per element.

    Source: arXiv:1711.05101.
    """

    rules: ClassVar[dict[str, Rule]] = {"rule": one_of("adamw")}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Any = 1e-2,
        amsgrad: bool = False,
        *,
        nonfinite: str = "propagate",
        maximize: bool = False,
        telemetry: int = 0,
        mantissa: bool = False,
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        settings |= dict(nonfinite=nonfinite, maximize=maximize, telemetry=telemetry)
        settings |= dict(state_dtype=state_dtype, stochastic_rounding=stochastic_rounding)
        settings |= dict(mantissa=mantissa)
        torchs = dict(
            amsgrad=amsgrad, foreach=foreach, fused=fused, capturable=capturable,
            differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, {"rule": "adamw", **settings}, torchs, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and param_group.get("rule") == "matrix":
            view = ("rule", *VIEW_DEFAULTS)
            param_group = {k: v for k, v in param_group.items() if k not in view}
        super().add_param_group(param_group)
