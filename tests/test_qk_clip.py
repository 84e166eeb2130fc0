"""QK-clip: logits above tau come down to it, head by head, under any optimizer."""

from __future__ import annotations

import pytest
import torch
from orthonorm import optim
from torch import Tensor, nn

HEADS, KV, D, WIDTH, LENGTH = 4, 2, 6, 10, 9


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def heads_of(x: Tensor, W: Tensor, heads: int) -> Tensor:
    return (x @ W.mT).unflatten(-1, (heads, -1)).transpose(-2, -3)


def largest(q: Tensor, k: Tensor, scale: float, causal: bool = False) -> Tensor:
    S = q @ k.repeat_interleave(q.shape[-3] // k.shape[-3], -3).mT * scale
    if causal:
        S = S.masked_fill(torch.ones_like(S, dtype=torch.bool).triu(1), -torch.inf)
    return S.amax((0, 2, 3))


@pytest.mark.parametrize("causal", [False, True])
def test_observed_logits_are_the_largest(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthonorm.optim.qk_clip.ROWS", 4)  # several blocks of queries
    q, k = randn(3, HEADS, LENGTH, D), randn(3, KV, LENGTH, D, seed=1)
    seen = torch.zeros(HEADS, dtype=torch.float64)
    optim.observe_logits_(seen, q, k, causal=causal)
    want = largest(q, k, D**-0.5, causal)
    torch.testing.assert_close(seen, want)
    optim.observe_logits_(seen, 0.5 * q, k, causal=causal)
    torch.testing.assert_close(seen, want)


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_logits_end_at_tau(alpha: float) -> None:
    """Heads above tau end at it (grouped keys: at it or below), the others stay where they were."""
    x = randn(2, LENGTH, WIDTH)
    for kv in (HEADS, KV):
        Q, K = randn(HEADS * D, WIDTH, seed=2), randn(kv * D, WIDTH, seed=3)
        before = largest(heads_of(x, Q, HEADS), heads_of(x, K, kv), 1.0)
        tau = float(before.sort().values[1] + 1e-3)
        optim.qk_clip_(Q, K, before, tau=tau, alpha=alpha, kv_heads=kv)
        after = largest(heads_of(x, Q, HEADS), heads_of(x, K, kv), 1.0)
        assert (after <= before.clamp(max=tau) * (1 + 1e-12)).all()
        if kv == HEADS:
            torch.testing.assert_close(after, before.clamp(max=tau))


def test_latent_attention_scales_the_rotary_part_in_full() -> None:
    """q = (content, rotary) meets k = (own content, shared rotary key): only q^R can shrink."""
    rope, values = 2, 3
    Q, K = randn(HEADS * (D + rope), WIDTH, seed=4), randn(HEADS * (D + values), WIDTH, seed=5)
    x, shared = randn(2, LENGTH, WIDTH), randn(2, 1, LENGTH, rope, seed=6)

    def logits() -> Tensor:
        k = heads_of(x, K, HEADS)[..., :D]
        full = torch.cat((k, shared.expand(*k.shape[:-1], rope)), -1)
        return largest(heads_of(x, Q, HEADS), full, 1.0)

    before, kept = logits(), K.clone()
    tau = float(before.mean())
    optim.qk_clip_(Q, K, before, tau=tau, rope=rope, values=values)
    torch.testing.assert_close(logits(), before.clamp(max=tau))
    assert torch.equal(K.unflatten(0, (HEADS, -1))[:, D:], kept.unflatten(0, (HEADS, -1))[:, D:])


def test_after_the_step_of_any_optimizer() -> None:
    fused = nn.Parameter(torch.cat((randn(HEADS * D, WIDTH), randn(HEADS * D, WIDTH, seed=1))))
    opt = torch.optim.SGD([fused], lr=0.0)
    q, k = fused.detach().split(HEADS * D)
    seen = torch.full((HEADS,), 400.0)
    handle = optim.qk_clip_after_step(opt, [dict(query=q, key=k, logits=seen)], tau=100.0)
    before = fused.detach().clone()
    fused.grad = torch.zeros_like(fused)
    opt.step()
    torch.testing.assert_close(fused.detach(), 0.5 * before)
    assert torch.equal(seen, torch.zeros(HEADS))
    opt.step()
    handle.remove()
    seen.fill_(400.0)
    opt.step()
    torch.testing.assert_close(fused.detach(), 0.5 * before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_overflowed_logit_clips_as_the_largest_float16(dtype: torch.dtype) -> None:
    """The least that an overflow proves: never less than the formula leaves, never nothing."""
    weights = [randn(HEADS * D, WIDTH, seed=seed).to(dtype) for seed in (0, 1)]
    kept = [W.clone() for W in weights]
    optim.qk_clip_(*weights, torch.tensor([torch.inf, 50.0, torch.inf, torch.inf]), rope=2)
    rows = torch.tensor([1.0, 0.0, 1.0, 1.0]).repeat_interleave(D) > 0
    gamma = 100.0 / torch.finfo(torch.float16).max
    full = (torch.arange(HEADS * D) % D >= D - 2) & rows
    for W, old, own in zip(weights, kept, (full, torch.zeros_like(rows)), strict=True):
        factor = torch.where(own, gamma, torch.where(rows, gamma**0.5, 1.0)).double()
        torch.testing.assert_close(W, (old.double() * factor[:, None]).to(dtype))
        assert W.isfinite().all() and (W != 0).all()


def test_an_overflow_is_clipped_until_it_is_gone() -> None:
    """Logits of 1e39 in float32, which has no such number, end at tau after some steps."""
    x = randn(2, LENGTH, WIDTH).float()
    Q, K = (1e19 * randn(HEADS * D, WIDTH, seed=seed).float() for seed in (2, 3))
    found = []
    for _ in range(16):
        seen = torch.zeros(HEADS)
        optim.observe_logits_(seen, heads_of(x, Q, HEADS), heads_of(x, K, HEADS), scale=1.0)
        found.append(seen)
        optim.qk_clip_(Q, K, seen)
    assert (found[0] == torch.inf).all()
    torch.testing.assert_close(found[-1], torch.full((HEADS,), 100.0))


def test_infinities_of_both_signs_are_an_overflow_and_nan_in_is_nan() -> None:
    q = torch.tensor([3e38, 3e38]).expand(1, 2, 3, 2)
    k = torch.tensor([10.0, -10.0]).expand(1, 2, 3, 2).clone()
    assert (q @ k.mT).isnan().any()
    seen = torch.zeros(2)
    optim.observe_logits_(seen, q, k)
    assert torch.equal(seen, torch.full((2,), torch.inf))
    k[0, 1, 2, 0] = torch.nan
    seen.zero_()
    optim.observe_logits_(seen, q, k)
    assert seen[0] == torch.inf and seen[1].isnan()


def test_what_does_not_clip_and_what_is_refused() -> None:
    Q, K = randn(HEADS * D, WIDTH), randn(HEADS * D, WIDTH, seed=1)
    kept = Q.clone()
    optim.qk_clip_(Q, K, torch.tensor([99.0, -500.0, torch.nan, -torch.inf]))
    assert torch.equal(Q, kept)
    ok = dict(query=Q, key=K, logits=torch.full((HEADS,), 500.0))
    for bad in (
        dict(logits=torch.ones(5)), dict(kv_heads=3), dict(rope=D + 1), dict(values=D + 1),
        dict(tau=0.0), dict(alpha=1.5), dict(key=K[:-1]), dict(key=K[:1].expand(HEADS * D, WIDTH)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="qk_clip_"):
            optim.qk_clip_(**{**ok, **bad})
        with pytest.raises(ValueError, match="qk_clip_"):
            optim.qk_clip_after_step(torch.optim.SGD([Q], lr=0.1), [{**ok, **bad}])
        assert torch.equal(Q, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(1, 2, 4, 8, dtype=torch.float64)}, "must share one dtype"),
        ({"scale": float("nan")}, "scale must be in"),
        ({"scale": "1"}, "scale must be a number"),
        ({"k": torch.ones(1, 2, 0, 8)}, "k must not be empty"),
        ({"k": torch.ones(1, 0, 4, 8)}, "k must not be empty"),
        ({"q": torch.ones(0, 2, 4, 8)}, "q must not be empty"),
    ],
)
def test_observing_refuses_before_it_writes(change, message):
    seen, x = torch.zeros(2), torch.ones(1, 2, 4, 8)
    with pytest.raises((ValueError, TypeError), match=f"observe_logits_: .*{message}"):
        optim.observe_logits_(**{"seen": seen, "q": x, "k": x, **change})
    assert not seen.any()


def test_a_layer_without_logits_is_named():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(TypeError, match=r"layers\[0\]\['logits'\] must be a Tensor, got NoneType"):
        optim.qk_clip_after_step(optimizer, [{"query": torch.ones(2, 2), "key": torch.ones(2, 2)}])
