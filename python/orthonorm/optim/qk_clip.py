"""QK-clip: W_q <- gamma^alpha W_q, W_k <- gamma^(1-alpha) W_k per head, gamma = min(1, tau / S).

S is the largest attention logit of the head. MuonClip is Muon with adjust_lr_fn="match_rms_adamw"
and weight decay, and QK-clip after every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

ROWS = 1024  # queries whose logits are in memory at a time
OVERFLOWED = 65504.0  # the largest float16; a logit that overflowed is at least that


@torch.no_grad()
def observe_logits_(
    seen: Tensor, q: Tensor, k: Tensor, *, scale: float | None = None, causal: bool = False
) -> Tensor:
    """seen_h <- max(seen_h, max_ij scale q_hi . k_hj), over the batch; call it in `forward`.

    Args:
        seen: (heads,), overwritten and returned; start with zeros.
        q, k: (..., heads, T, d) and (..., kv_heads, T', d), after rotary embeddings; each head of k
            serves heads / kv_heads consecutive heads of q.
        scale: factor of the logits; None: 1 / sqrt(d).
        causal: take only the logits with j <= i + T' - T.

    If logits of a head overflow, though its q and k are finite, +inf is written for it. That holds
    too if infinities of both signs make the logits NaN. If q or k are not finite, NaN is written.

    Under data or context parallelism, reduce `seen` over ranks by the maximum before the step.

    Raises: ValueError or TypeError where shapes, dtypes or `scale` do not fit, before anything is
    written.
    """
    op = "observe_logits_"
    check.tensor(op, "seen", seen, min_dim=1)
    check.tensor(op, "q", q, min_dim=3)
    check.tensor(op, "k", k, min_dim=3)
    check.same_dtype(op, q=q, k=k)
    check.same_device(op, seen=[seen], q=[q], k=[k])
    if scale is not None:
        check.number(op, "scale", scale)
    check.equal_shape(op, "seen", seen, q.shape[-3:-2])
    for name, x in (("q", q), ("k", k)):
        if not x.numel():
            raise ValueError(f"{op}: {name} must not be empty, got shape {check.shape(x)}")
    (heads, T, d), (kv_heads, length, _) = q.shape[-3:], k.shape[-3:]
    check.equal_shape(op, "k", k, (*q.shape[:-3], kv_heads, length, d))
    _divides(op, "kv_heads", kv_heads, "heads", heads)
    k = k.repeat_interleave(heads // kv_heads, -3).transpose(-1, -2)
    finite = _finite(q) & _finite(k)
    for first in range(0, T, ROWS):
        logits = (q[..., first : first + ROWS, :] @ k) * (d**-0.5 if scale is None else scale)
        if causal:
            i = torch.arange(first, first + logits.shape[-2], device=q.device) + length - T
            later = torch.arange(length, device=q.device) > i[:, None]
            logits = logits.masked_fill(later, -torch.inf)
        largest = logits.amax((-1, -2)).reshape(-1, heads).amax(0)
        largest = torch.where(largest.isnan() & finite, torch.inf, largest)
        seen.copy_(torch.maximum(seen, largest))
    return seen


@torch.no_grad()
def qk_clip_(
    query: Tensor,
    key: Tensor,
    logits: Tensor,
    *,
    tau: float = 100.0,
    alpha: float = 0.5,
    kv_heads: int | None = None,
    rope: int = 0,
    values: int = 0,
) -> None:
    """W_q <- gamma_h^alpha W_q, W_k <- gamma_h^(1-alpha) W_k in the rows of head h: logits <= tau.

    gamma_h = min(1, tau / S_h).

    Args:
        query, key: weights (or biases), rows by heads: (heads d, ...), (kv_heads d', ...); they may
            be slices of a fused weight.
        logits: S, (heads,). Values up to tau and NaN clip nothing. +inf stands for a logit that
            overflowed, and counts as 65504, the largest float16, which it has at least been. So it
            never clips more than tau / S would; if logits are still above tau, the next steps clip
            them.
        tau: largest logit that is allowed.
        alpha: the queries' share of the reduction.
        kv_heads: heads of `key` (None: as many as of `query`). A key that serves several queries
            takes the smallest of their gammas.
        rope: number of last rows of each query head that meet a key shared by all heads (MLA).
            They are multiplied by gamma.
        values: number of last rows of each key head that are not keys (MLA's kv_b_proj). They are
            not touched.

    Raises: ValueError or TypeError, before anything is written, where arguments do not fit: for
    example if heads do not divide rows.

    Source: arXiv:2507.20534 (Kimi K2), section 2.1.
    """
    for part, factor in _parts(query, key, logits, tau, alpha, kv_heads, rope, values):
        part.mul_(factor.view(-1, *[1] * (part.dim() - 1)))


def _parts(
    query: Tensor,
    key: Tensor,
    logits: Tensor,
    tau: float = 100.0,
    alpha: float = 0.5,
    kv_heads: int | None = None,
    rope: int = 0,
    values: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Check the arguments of `qk_clip_`; return (view, factors) pairs that it multiplies.

    Views are (heads, rows, ...), factors (heads,).
    """
    op = "qk_clip_"
    check.tensor(op, "query", query, min_dim=1)
    check.tensor(op, "key", key, min_dim=1)
    for name, weight in (("query", query), ("key", key)):
        check.not_expanded(f"{op}: {name}", weight)
    check.tensor(op, "logits", logits, min_dim=1)
    check.number(op, "tau", tau, 1e-30)
    check.number(op, "alpha", alpha, 0.0, 1.0)
    heads = logits.numel()
    kv_heads = heads if kv_heads is None else kv_heads
    check.integer(op, "kv_heads", kv_heads, 1)
    _divides(op, "kv_heads", kv_heads, "heads", heads)
    _divides(op, "heads", heads, "rows of query", query.shape[0])
    _divides(op, "kv_heads", kv_heads, "rows of key", key.shape[0])
    Q, K = query.unflatten(0, (heads, -1)), key.unflatten(0, (kv_heads, -1))
    for name, value, rows in (("rope", rope, Q.shape[1]), ("values", values, K.shape[1])):
        check.integer(op, name, value, 0)
        check.number(op, name, value, 0, rows)
    S = logits.detach().double().reshape(-1)
    S = torch.where(S.isposinf(), OVERFLOWED, S)
    gamma = torch.where(tau < S, tau / S, 1.0)
    least = gamma.view(kv_heads, -1).amin(1)
    content = Q.shape[1] - rope
    return [
        (Q[:, :content], gamma**alpha),
        (Q[:, content:], gamma),
        (K[:, : K.shape[1] - values], least ** (1 - alpha)),
    ]


def qk_clip_after_step(
    optimizer: torch.optim.Optimizer, layers: Iterable[Mapping[str, Any]], **settings: Any
) -> Any:
    """Call `qk_clip_` on every layer after each step of an optimizer, then zero its logits.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        layers: a dict of `qk_clip_` arguments per layer; `observe_logits_` writes its `logits`.
        **settings: arguments of `qk_clip_` for all layers, such as `tau`.

    Returns: a handle whose remove() ends the calls.
    """
    kept = [{**settings, **layer} for layer in layers]
    for i, layer in enumerate(kept):
        check.tensor("qk_clip_after_step", f"layers[{i}]['logits']", layer.get("logits"))
        _parts(**layer)  # raises for wrong arguments

    def clip(*_: Any) -> None:
        for layer in kept:
            qk_clip_(**layer)
            layer["logits"].zero_()

    return optimizer.register_step_post_hook(clip)


def _finite(x: Tensor) -> Tensor:
    """Return for each head of (..., heads, a, b) whether all its entries are finite, (heads,)."""
    return x.isfinite().all(-1).all(-1).reshape(-1, x.shape[-3]).all(0)


def _divides(op: str, name: str, value: int, label: str, whole: int) -> None:
    if whole % value:
        raise ValueError(f"{op}: {name} must divide the {label}, {whole}, got {value}")
