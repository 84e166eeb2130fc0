"""Param groups and views: routing, heads, fused weights, experts, convolutions, memory formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, set_grads
from orthonorm import optim
from torch import Tensor, nn

MATRIX = [row for row in ROWS if row.name != "AdamW"]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(3, 8, 3)
        self.conv1 = nn.Conv1d(4, 8, 3)
        self.experts = nn.Parameter(torch.randn(3, 8, 6))
        self.attn = nn.MultiheadAttention(8, 2)
        self.qkv = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(8)
        self.value = nn.Linear(8, 1)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight


def test_split_params_routes_every_parameter_once() -> None:
    model = Tiny()
    model.norm.bias.requires_grad_(False)
    groups = optim.split_params(
        model, split={"qkv.weight": (8, 4, 4)}, heads={"qkv.weight": (2, 1, 1)}
    )
    routed = {name: g for g in groups for name, _ in g["params"]}
    assert set(routed) == {n for n, p in model.named_parameters() if p.requires_grad}
    matrix = {n for n, g in routed.items() if g["rule"] == "matrix"}
    assert matrix == {
        "conv.weight", "conv1.weight", "experts", "attn.in_proj_weight", "attn.out_proj.weight",
        "qkv.weight",
    }  # fmt: skip
    assert routed["qkv.weight"]["split"] == (8, 4, 4) and routed["qkv.weight"]["heads"] == (2, 1, 1)
    assert routed["attn.in_proj_weight"]["split"] == (8, 8, 8)
    assert routed["conv1.weight"]["flatten"] is True
    with pytest.raises(ValueError, match="nothing_like_this"):
        optim.split_params(model, heads={"nothing_like_this": 2})
    for cls in (optim.Muon, optim.Conda):
        opt = cls(groups, lr=0.01)
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        opt.step()


@pytest.mark.parametrize("name", ["Muon", "Conda"])
def test_views_are_the_matrices_they_stand_for(name: str) -> None:
    """heads, split, experts and convolutions equal separate parameters of those shapes."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kwargs = dict(lr=0.1, weight_decay=0.1, **(
        {"adjust_lr_fn": "match_rms_adamw", "precision": "full"} if name == "Muon"
        else {"update_proj_gap": 2}))  # fmt: skip
    fused, experts, conv = randn(12, 5), randn(3, 4, 6), randn(5, 3, 2, 2)
    pieces = [*fused[:8].view(2, 4, 5), fused[8:10], fused[10:], *experts, conv.reshape(5, -1)]
    separate = [nn.Parameter(x.clone()) for x in pieces]
    whole = [nn.Parameter(x.clone()) for x in (fused, experts, conv)]
    groups = [
        {"params": whole[:1], "split": (8, 2, 2), "heads": (2, 1, 1)},
        {"params": whole[1:]},
    ]
    a, b = optim.REGISTRY[name](groups, **kwargs), optim.REGISTRY[name](separate, **kwargs)
    for _ in range(4):
        G, E, C = randn(12, 5), randn(3, 4, 6), randn(5, 3, 2, 2)
        whole[0].grad, whole[1].grad, whole[2].grad = G.clone(), E.clone(), C.clone()
        for p, g in zip(
            separate, [*G[:8].view(2, 4, 5), G[8:10], G[10:], *E, C.reshape(5, -1)], strict=True
        ):
            p.grad = g.clone()
        a.step()
        b.step()
    after = [*whole[0][:8].view(2, 4, 5), whole[0][8:10], whole[0][10:], *whole[1],
             whole[2].reshape(5, -1)]  # fmt: skip
    for x, p in zip(after, separate, strict=True):
        torch.testing.assert_close(x, p, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("row", MATRIX, ids=lambda r: r.name)
def test_inputs_by_outputs_step_as_their_transposes(row: Row) -> None:
    """Shape factors, rows, columns, split, heads and stacks are those of W^T; so is state."""
    shapes = ((5, 12), (9, 6), (3, 6, 4), (8, 8))
    keys: list[dict[str, Any]] = [{"split": (8, 4)}, {"heads": 2}, {"split": (3, 1)}, {}]
    stored, turned = make(shapes=shapes), make(shapes=shapes)
    for p in turned:
        p.data = p.data.mT.contiguous()

    def groups(params: list[nn.Parameter], **more: bool) -> list[dict[str, Any]]:
        return [{"params": [p], **k, **more} for p, k in zip(params, keys, strict=True)]

    a, b = build(row, groups(stored, transpose=True)), build(row, groups(turned))
    for step in range(4):
        set_grads(step, stored)
        for p, q in zip(stored, turned, strict=True):
            assert p.grad is not None
            q.grad = p.grad.mT.clone()
        a.step()
        b.step()
    for p, q in zip(stored, turned, strict=True):
        torch.testing.assert_close(p.detach().mT, q.detach(), rtol=1e-9, atol=1e-10)
    sizes = [[t.numel() for t in opt.state[p].values() if isinstance(t, Tensor)]
             for opt, params in ((a, stored), (b, turned)) for p in params]  # fmt: skip
    assert sizes[:4] == sizes[4:]


@pytest.mark.parametrize(
    "more", [{"mantissa": True}, {"state_dtype": "float32"}, {"state_dtype": "8bit"},
             {"state_dtype": "bfloat16"}, {"constraint": "normalize"}, {"decay": "cautious"}],
    ids=str,
)  # fmt: skip
def test_inputs_by_outputs_with_every_storage(more: dict[str, Any]) -> None:
    stored = make(torch.bfloat16, [(5, 12)])
    turned = [nn.Parameter(p.detach().mT.contiguous()) for p in stored]
    a = optim.NorMuon([{"params": stored, "split": (8, 4), "transpose": True}], lr=0.02, **more)
    b = optim.NorMuon([{"params": turned, "split": (8, 4)}], lr=0.02, **more)
    for step in range(3):
        set_grads(step, stored)
        assert stored[0].grad is not None
        turned[0].grad = stored[0].grad.mT.clone()
        a.step()
        b.step()
    assert torch.equal(stored[0].mT, turned[0])


def test_channels_last_and_transposed_weights() -> None:
    weight = torch.randn(8, 6, 3, 3)
    plain = nn.Parameter(weight.clone())
    last = nn.Parameter(weight.clone().to(memory_format=torch.channels_last))
    turned = nn.Parameter(torch.randn(7, 5).mT)
    a = optim.Muon([plain], lr=0.1)
    b = optim.Muon([last, turned], lr=0.1)
    grad = torch.randn_like(weight)
    plain.grad, last.grad = grad.clone(), grad.clone().to(memory_format=torch.channels_last)
    turned.grad = torch.randn(5, 7)
    a.step()
    b.step()
    torch.testing.assert_close(plain, last, atol=1e-5, rtol=1e-5)
    assert turned.isfinite().all()


def test_bad_views_are_refused() -> None:
    p = nn.Parameter(torch.ones(12, 5))
    for keys, word in (
        ({"heads": 5}, "heads"), ({"split": (6, 5)}, "split"),
        ({"split": (6, 6), "heads": (1,)}, "heads"), ({"transpose": 2}, "transpose"),
        ({"transpose": True, "split": (6, 6)}, "add up to 5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            optim.Muon([{"params": [p], **keys}])
    with pytest.raises(ValueError, match="transpose must be False for flattened weights"):
        optim.Muon([{"params": [nn.Parameter(torch.ones(2, 3, 4, 4))], "transpose": True}])
    with pytest.raises(ValueError, match="heads must divide the 3 rows"):
        optim.Muon([{"params": [nn.Parameter(torch.ones(2, 3, 4))], "heads": 2}])


def test_one_object_serves_schedulers_and_clipping() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    opt = optim.Muon(optim.split_params(model), lr=0.1, adamw=dict(lr=1e-2))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 30)
    x = torch.randn(32, 6)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert opt.param_groups[0]["lr"] < 1e-6 and opt.param_groups[1]["lr"] < 1e-6
