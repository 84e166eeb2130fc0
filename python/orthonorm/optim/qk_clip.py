"""QK-clip: W_q <- gamma^alpha W_q, W_k <- gamma^(1-alpha) W_k per head, gamma = min(1, tau / S).

S is the largest attention logit of the head. Muon with adjust_lr_fn="match_rms_adamw" and weight
decay, and this after every step, is MuonClip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

ROWS = 1024  # queries whose logits are in memory at a time
OVERFLOWED = 65504.0  # the largest float16: what an infinite logit is at least


@torch.no_grad()
def observe_logits_(
    seen: Tensor, q: Tensor, k: Tensor, *, scale: float | None = None, causal: bool = False
) -> Tensor:
    """seen_h <- max(seen_h, max_ij scale q_hi . k_hj), over the batch; to be called in `forward`.

    Args:
        seen: (heads,), overwritten and returned; start at zero.
        q, k: (..., heads, T, d) and (..., kv_heads, T', d), after rotary embeddings; each head of k
            serves as many consecutive heads of q.
        scale: 1 / sqrt(d) if None.
        causal: only j <= i + T' - T.

    A head whose logits overflow, though q and k are finite, is seen as +inf, also where sums of
    infinities of both signs are NaN. Where q or k are not finite, NaN is seen.

    Under data or context parallelism reduce `seen` by its maximum before the step.

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
    """Rows of head h of W_q times gamma_h^alpha, of W_k times gamma^(1-alpha): no logit above tau.

    Args:
        query, key: weights (or biases), rows by heads: (heads d, ...), (kv_heads d', ...); slices
            of a fused weight do.
        logits: S, (heads,); what is not above tau, or NaN, clips nothing. +inf is a logit that
            overflowed: it counts as 65504, the largest float16 and so the least that it can have
            been. That never clips more than tau / S would; what is then still above tau is clipped
            after the next steps.
        tau, alpha: the largest logit, and the share of the queries in its reduction.
        kv_heads: heads of `key` (None: as many as of `query`). A key that serves several queries
            takes the least of their gammas.
        rope: last rows of each query head that meet a key shared by all heads (MLA): times gamma.
        values: last rows of each key head that are not keys (MLA's kv_b_proj): not touched.

    Raises: ValueError where rows do not divide, before anything is written.

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
    """What `qk_clip_` multiplies, views (heads, rows, ...), by which numbers; checked."""
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
    """`qk_clip_` on every layer after each step of any optimizer; its logits start at zero again.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        layers: arguments of `qk_clip_`, a dict each, `logits` being what `observe_logits_` writes.
        **settings: arguments of `qk_clip_` for all of them, as `tau`.

    Returns: a handle whose remove() ends it.
    """
    kept = [{**settings, **layer} for layer in layers]
    for i, layer in enumerate(kept):
        check.tensor("qk_clip_after_step", f"layers[{i}]['logits']", layer.get("logits"))
        _parts(**layer)  # refuses what it must

    def clip(*_: Any) -> None:
        for layer in kept:
            qk_clip_(**layer)
            layer["logits"].zero_()

    return optimizer.register_step_post_hook(clip)


def _finite(x: Tensor) -> Tensor:
    """Which heads of (..., heads, a, b) are finite throughout."""
    return x.isfinite().all(-1).all(-1).reshape(-1, x.shape[-3]).all(0)


def _divides(op: str, name: str, value: int, label: str, whole: int) -> None:
    if whole % value:
        raise ValueError(f"{op}: {name} must divide the {label}, {whole}, got {value}")
