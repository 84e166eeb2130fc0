"""Steps on state in 8 bits (`blocks.py`): passes of `passes.py` between reading and rounding it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op
from .blocks import blocks_in, by_scales, check_codes, dequantize_blocks_, quantize_blocks_
from .passes import adamw_step_, check_adamw, kept


@op(
    "coded_adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, "
    "Tensor(c!)[] exp_avg_sq, Tensor(d!)[] exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, "
    "Tensor(f!)[] steps, Tensor lr, float beta1, float beta2, float eps, Tensor weight_decay, "
    "bool decay_first=True, bool correct_eps=True, Tensor? rounding=None, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    composite=True,
)
def coded_adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
    decay_first: bool = True,
    correct_eps: bool = True,
    rounding: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """W <- (1 - lr wd) W - lr m^ / (sqrt(v^) + eps), where m and v are kept as codes of 8 bits.

    It is dequantize_blocks_ of both averages (`exp_avg_sq` unsigned), adamw_step_ and
    quantize_blocks_; their arguments mean the same here. A kernel does it in one pass and writes
    the same bits, so that no averages in float32 are in memory.

    Shapes: entry i of the first four lists agree, any number of dimensions; codes are uint8. Scales
    i are (*batch, ceil(n / BLOCK)): batch are leading dimensions of params[i], usually none, and
    blocks are cut, in row-major order, from the n elements that its other dimensions hold. steps[i]
    has one element, float32 or float64. Source: arXiv:2110.02861.
    """
    scales = zip(exp_avg_scales, exp_avg_sq_scales, strict=True)
    lists = zip(params, grads, exp_avg, exp_avg_sq, scales, steps, strict=True)
    for w, g, m, v, (m_scales, v_scales), step in lists:
        dtype = torch.promote_types(w.dtype, torch.float32)
        moments = [torch.empty(w.shape, dtype=dtype, device=w.device) for _ in range(2)]
        coded = ((m, m_scales, True), (v, v_scales, False))
        for x, (codes, s, signed) in zip(moments, coded, strict=True):
            dequantize_blocks_([by_scales(x, s)], [by_scales(codes, s)], [s], signed)
        adamw_step_(
            [w], [g], [moments[0]], [moments[1]], [step], lr, beta1, beta2, eps, weight_decay,
            decay_first, correct_eps, rounding, grad_scale, found_inf,
        )  # fmt: skip
        for x, (codes, s, signed) in zip(moments, coded, strict=True):
            new = by_scales(torch.empty(codes.shape, dtype=codes.dtype, device=codes.device), s)
            new_scales = torch.empty_like(s)
            quantize_blocks_([new], [new_scales], [by_scales(x, s)], signed)
            codes.copy_(kept(found_inf, codes, new.view(codes.shape)))
            s.copy_(kept(found_inf, s, new_scales))


@coded_adamw_step_.check
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
    decay_first: bool = True,
    correct_eps: bool = True,
    rounding: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    name = "coded_adamw_step_"
    codes = dict(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    scales = dict(exp_avg_scales=exp_avg_scales, exp_avg_sq_scales=exp_avg_sq_scales)
    for label, values in (*dict(params=params, grads=grads).items(), *scales.items()):
        check.tensors(name, label, values)
    for label, values in codes.items():
        check_codes(name, label, values)
    check.same_shapes(name, params=params, grads=grads, **codes)
    check.same_lengths(name, params=params, **scales)
    for i, w in enumerate(params):
        batch = check.shape(w)[: max(0, exp_avg_scales[i].dim() - 1)]
        for label, values in scales.items():
            wanted = (*batch, blocks_in(check.shape(w)[len(batch) :]))
            check.equal_shape(name, f"{label}[{i}]", values[i], wanted)
    check.same_device(name, params=params, **scales)
    numbers = (lr, beta1, beta2, eps, weight_decay)
    check_adamw(name, params, steps, numbers, rounding, grad_scale, found_inf)
