"""Every optimizer, one row each, through the same bodies; then what is particular to one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from orthonorm import optim
from torch import Tensor, nn
from trusted import TrustedConda, TrustedMuon

SHAPES = ((24, 10), (10, 24), (16, 16), (1, 7), (7, 1), (1, 1), (150, 140), (33, 200))


class Row(NamedTuple):
    """An optimizer, its arguments, and a trusted implementation to follow in float64."""

    name: str
    kwargs: dict[str, Any]
    trusted: Callable[[list[Tensor]], Any]
    bad: dict[str, Any]  # argument -> a value it must refuse


ROWS = [
    Row(
        "Muon",
        dict(lr=0.02, precision="full"),
        lambda ps: TrustedMuon(ps, lr=0.02),
        dict(lr=-1.0, momentum=1.5, weight_decay=-0.1, ns_steps=0, adjust_lr_fn="rms",
             ns_coefficients="kelller", eps=-1.0, method="grams", precision="fp8", restarts=[7],
             nonfinite="ignore"),
    ),
    Row(
        "Conda",
        dict(lr=0.01, betas=(0.9, 0.99), update_proj_gap=3, weight_decay=0.1),
        lambda ps: TrustedConda(ps, 0.01, (0.9, 0.99), update_proj_gap=3, weight_decay=0.1),
        dict(lr=-1.0, betas=(0.9, 1.0), eps=-1.0, weight_decay=-0.1, update_proj_gap=0,
             scale=-1.0, nonfinite="ignore"),
    ),
    Row(
        "AdamW",
        dict(lr=0.01, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1, foreach=False),
        dict(lr=-1.0, betas=(0.9,), eps=-1.0, weight_decay=-0.1, nonfinite="ignore"),
    ),
]  # fmt: skip
ALL = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


def make(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in shapes
    ]


def build(row: Row, params: Any, **more: Any) -> optim.MatrixOptimizer:
    return optim.REGISTRY[row.name](params, **{**row.kwargs, **more})


def set_grads(step: int, *lists: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(lists[0]):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for params in lists:
            params[i].grad = g.to(params[i].dtype, copy=True)


def snapshot(opt: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for g in opt.param_groups for p in g["params"]]
    states = [v for p in params for v in opt.state.get(p, {}).values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in [*params, *states]]


def test_every_optimizer_has_a_row() -> None:
    assert {r.name for r in ROWS} == set(optim.REGISTRY)


@ALL
def test_follows_trusted_implementation(row: Row) -> None:
    ours, theirs = make(), make()
    a, b = build(row, ours), row.trusted(theirs)
    for step in range(7):
        set_grads(step, ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)


@ALL
def test_gradients_are_never_modified(row: Row) -> None:
    params = make(torch.float32)
    opt = build(row, params)
    set_grads(0, params)
    before = [p.grad.clone() for p in params]
    opt.step()
    for p, g in zip(params, before, strict=True):
        assert torch.equal(p.grad, g)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dict_round_trip_continues_bitwise(row: Row, dtype: torch.dtype) -> None:
    first, second = make(dtype), make(dtype)
    a, b = build(row, first), build(row, second)
    for step in range(4):
        set_grads(step, first)
        a.step()
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for p, q in zip(first, second, strict=True):
            q.copy_(p)
    for step in range(4, 8):
        set_grads(step, first, second)
        a.step()
        b.step()
    for x, y in zip(snapshot(a), snapshot(b), strict=True):
        assert torch.equal(x, y)


@ALL
def test_none_gradients_late_parameters_and_deepcopy(row: Row) -> None:
    params = make(torch.float32)
    opt = build(row, params[:3])
    set_grads(0, params)
    params[0].grad = None
    kept = params[0].detach().clone()
    opt.step()
    assert torch.equal(params[0], kept) and not opt.state.get(params[0])
    opt.add_param_group({"params": params[3:5]})
    set_grads(1, params)
    twin = copy.deepcopy(opt)
    opt.step()
    for mine, other in zip(opt.param_groups, twin.param_groups, strict=True):
        for p, q in zip(mine["params"], other["params"], strict=True):
            q.grad = p.grad.clone()
    twin.step()
    for x, y in zip(snapshot(opt), snapshot(twin), strict=True):
        assert torch.equal(x, y)


@ALL
def test_learning_rate_may_be_a_tensor_or_change(row: Row) -> None:
    ours, theirs = make(torch.float32), make(torch.float32)
    a, b = build(row, ours), build(row, theirs, lr=torch.tensor(row.kwargs["lr"]).double())
    scheduler = torch.optim.lr_scheduler.StepLR(a, 1, gamma=0.5)
    for step in range(3):
        set_grads(step, ours, theirs)
        a.step()
        b.step()
        scheduler.step()
        b.param_groups[0]["lr"].mul_(0.5)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


@ALL
def test_bad_arguments_are_refused_by_name(row: Row) -> None:
    for key, value in row.bad.items():
        params = make(torch.float32)
        with pytest.raises((ValueError, TypeError)) as error:
            build(row, params, **{key: value})
        message = str(error.value)
        word = {"ns_coefficients": "coefficients", "ns_steps": "steps"}.get(key, key)
        assert word.split("_")[-1] in message, (key, message)
    with pytest.raises(ValueError, match="momentun"):
        build(row, [{"params": make(), "momentun": 0.9}])
    with pytest.raises(ValueError, match="complex64"):
        build(row, [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@ALL
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_gradients(row: Row, value: float) -> None:
    params = make(torch.float32)
    opt = build(row, [("first", params[0]), ("second", params[1])], nonfinite="error")
    set_grads(0, params)
    opt.step()
    set_grads(1, params)
    params[1].grad[3, 2] = value
    before = snapshot(opt)
    with pytest.raises(ValueError, match="'second'"):
        opt.step()
    for x, y in zip(before, snapshot(opt), strict=True):
        assert torch.equal(x, y)

    params = make(torch.float32)
    opt = build(row, params[:2], nonfinite="skip")
    set_grads(0, params)
    params[1].grad[3, 2] = value
    kept = params[1].detach().clone()
    opt.step()
    assert torch.equal(params[1], kept) and not opt.state.get(params[1])
    assert opt.param_groups[0]["skipped"] == 1
    assert params[0].isfinite().all()

    params = make(torch.float32)
    opt = build(row, params[:2])
    for step in range(4):
        set_grads(step, params)
        if step == 2:
            params[1].grad[3, 2] = value
        opt.step()
    assert params[0].isfinite().all() and not params[1].isfinite().all()


@ALL
def test_sparse_gradient_is_refused_before_anything_is_written(row: Row) -> None:
    params = make(torch.float32, ((5, 4), (6, 4)))
    opt = build(row, params)
    set_grads(0, params)
    params[1].grad = torch.ones(6, 4).to_sparse()
    before = snapshot(opt)
    with pytest.raises(ValueError, match="dense"):
        opt.step()
    for x, y in zip(before, snapshot(opt), strict=True):
        assert torch.equal(x, y)


@ALL
def test_zero_gradients_leave_weights_at_zero_decay(row: Row) -> None:
    params = make(torch.float32)
    opt = build(row, params, weight_decay=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    opt.step()
    opt.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@ALL
def test_versions_are_bumped_and_closure_runs(row: Row) -> None:
    params = make(torch.float32, ((6, 4),))
    opt = build(row, params)
    version = params[0]._version

    def closure() -> Tensor:
        opt.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert isinstance(opt.step(closure), Tensor)
    assert params[0]._version > version


@ALL
def test_empty_lists_and_empty_parameters(row: Row) -> None:
    opt = build(row, make(torch.float32, ((0, 4), (4, 0))))
    opt.step()
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    opt.step()


@pytest.mark.parametrize("name", ["Muon", "Conda"])
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e18])
def test_update_survives_extreme_gradient_scales(name: str, scale: float) -> None:
    kwargs = dict(lr=0.1, weight_decay=0.0, **({"eps": 0.0} if name == "Conda" else {}))
    params, scaled = make(torch.float32, ((8, 6), (200, 140))), make(torch.float32, ((8, 6), (200, 140)))
    a, b = optim.REGISTRY[name](params, **kwargs), optim.REGISTRY[name](scaled, **kwargs)
    set_grads(0, params, scaled)
    for p in scaled:
        p.grad = p.grad * scale
    a.step()
    b.step()
    for p, q in zip(params, scaled, strict=True):
        assert q.isfinite().all()
        if name == "Muon":  # scale invariance; Conda's squares leave float32 at these scales
            torch.testing.assert_close(p, q, atol=2e-3, rtol=0)


# ---- Muon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torch_muon_within_bfloat16(adjust: str | None, nesterov: bool) -> None:
    shapes = ((64, 32), (32, 64), (40, 40), (130, 200), (256, 129))
    ours, theirs = make(torch.float32, shapes), make(torch.float32, shapes)
    exact = make(torch.float64, shapes)
    kwargs = dict(lr=0.02, nesterov=nesterov, adjust_lr_fn=adjust)
    a = optim.Muon(ours, eps=1e-7, **kwargs)
    b = torch.optim.Muon(theirs, **kwargs)
    c = TrustedMuon(exact, 0.02, nesterov=nesterov, adjust_lr_fn=adjust)
    for step in range(5):
        set_grads(step, exact, ours, theirs)
        a.step()
        b.step()
        c.step()
    for p, q, r in zip(ours, theirs, exact, strict=True):
        assert (p - r).norm() <= 2 * (q - r).norm()  # no further from the truth than torch's bf16


def test_muon_loads_torch_muon_state() -> None:
    shapes = ((64, 32), (32, 64))
    theirs, ours = make(torch.float32, shapes), make(torch.float32, shapes)
    b = torch.optim.Muon(theirs, lr=0.03, momentum=0.9, weight_decay=0.2)
    for step in range(3):
        set_grads(step, theirs)
        b.step()
    a = optim.Muon(ours, lr=1.0)
    a.load_state_dict(copy.deepcopy(b.state_dict()))  # torch shares what it need not cast
    group = a.param_groups[0]
    assert (group["lr"], group["momentum"], group["eps"]) == (0.03, 0.9, 1e-7)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
            torch.testing.assert_close(
                a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"], atol=0, rtol=0
            )
    set_grads(3, ours, theirs)
    before = [p.detach().clone() for p in ours]
    a.step()
    b.step()
    for p, q, old in zip(ours, theirs, before, strict=True):  # bfloat16's error is 1e-2 to 3e-2
        assert (p - q).norm() <= 3e-2 * (p - old).norm()


def test_muon_refuses_unsafe_combinations_and_vectors() -> None:
    with pytest.raises(ValueError, match="polar_express"):
        optim.Muon(make(), ns_coefficients="aol_flipping")
    with pytest.raises(ValueError, match="bfloat16"):
        optim.Muon(make(), method="gram", precision="bfloat16")
    with pytest.raises(ValueError, match="at least two dimensions"):
        optim.Muon([nn.Parameter(torch.ones(3))])


# ---- Conda --------------------------------------------------------------------------------------


def test_conda_momentum_is_stored_rotated() -> None:
    params = make(torch.float64, ((12, 5), (5, 12)))
    opt = optim.Conda(params, lr=0.01, update_proj_gap=2)
    momenta = [torch.zeros_like(p) for p in params]
    for step in range(5):
        set_grads(step, params)
        opt.step()
        for p, m in zip(params, momenta, strict=True):
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            state = opt.state[p]
            Q, rotated = state["basis"], state["exp_avg"]
            back = rotated @ Q.mT if p.shape[0] >= p.shape[1] else Q @ rotated
            torch.testing.assert_close(back, m, atol=1e-13, rtol=1e-12)
            torch.testing.assert_close(Q.mT @ Q, torch.eye(5, dtype=Q.dtype), atol=1e-13, rtol=0)


def test_conda_companion_follows_its_authors_adamw() -> None:
    vector = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    opt = optim.Conda([{"params": [vector], "rule": "adamw"}], lr=0.1, eps=1e-3, weight_decay=0.2)
    w, m, v = vector.detach().clone(), torch.zeros(9).double(), torch.zeros(9).double()
    for t in range(1, 5):
        set_grads(t, [vector])
        g = vector.grad
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.1 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-3)
        w = w - 0.1 * 0.2 * w
        opt.step()
        torch.testing.assert_close(vector.detach(), w, atol=1e-13, rtol=1e-12)


# ---- groups and views ---------------------------------------------------------------------------


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
        ({"heads": 5}, "heads"), ({"split": (6, 5)}, "split"), ({"split": (6, 6), "heads": (1,)}, "heads"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            optim.Muon([{"params": [p], **keys}])
    with pytest.raises(ValueError, match="2-D"):
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
