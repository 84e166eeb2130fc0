"""Every optimizer, one row each, through the same bodies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, set_grads, snapshot
from orthonorm import optim
from orthonorm.ops import steps
from torch import Tensor

ALL = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


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
def test_parts_of_a_step_share_one_work_buffer(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that do not fit it together are updated as those that do."""
    together, apart = make(), make()
    a, b = build(row, together), build(row, apart)
    for step in range(3):
        set_grads(step, together, apart)
        a.step()
        with monkeypatch.context() as patch:
            patch.setattr(steps, "WORK", 1)
            b.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)


@ALL
def test_gradients_are_never_modified(row: Row) -> None:
    if row.writes_gradients:
        return
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
    for mine, other in zip(opt.param_groups, twin.param_groups, strict=True):
        for p, q in zip(mine["params"], other["params"], strict=True):
            q.grad = p.grad.clone()
    opt.step()
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
    opt = build(row, params, **row.no_decay)
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
    params, scaled = (
        make(torch.float32, ((8, 6), (200, 140))),
        make(torch.float32, ((8, 6), (200, 140))),
    )
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


@pytest.mark.parametrize("kind", ["zero", "tiny", "one row", "rank 1"])
def test_shampoo_without_eps_takes_the_pseudo_inverse(kind: str) -> None:
    """U V^T of the first gradient's nonzero singular values; zeros and underflow are no step."""
    torch.manual_seed(0)
    grad = torch.randn(2, 6, 4)
    grad = {
        "zero": 0 * grad, "tiny": 1e-25 * grad, "one row": grad * torch.eye(6)[0][:, None],
        "rank 1": grad[..., :1] @ grad[:, :1, :],
    }[kind]  # fmt: skip
    p = torch.nn.Parameter(torch.zeros(2, 6, 4))
    optimizer = optim.Shampoo([p], lr=1.0, eps=0.0)
    p.grad = grad
    optimizer.step()
    U, sigma, Vh = torch.linalg.svd(grad.double(), full_matrices=False)
    kept = (sigma > 1e-6 * sigma[:, :1]) & (sigma > 1e-20)
    wanted = -(U * kept[:, None, :]) @ Vh
    torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-4, atol=1e-4)
    for _ in range(3):
        optimizer.step()
    assert p.isfinite().all()


def test_scion_takes_a_stack_of_four_dimensions_for_its_matrices() -> None:
    """norm="auto" took its last two dimensions for the taps of a convolution."""
    torch.manual_seed(0)
    stack, grad = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5)
    one, each = torch.nn.Parameter(stack.clone()), [
        torch.nn.Parameter(x.clone()) for x in stack.flatten(0, 1)
    ]  # fmt: skip
    one.grad = grad
    for p, g in zip(each, grad.flatten(0, 1), strict=True):
        p.grad = g
    optim.Scion([{"params": [one], "flatten": False}]).step()
    optim.Scion(each).step()
    assert torch.equal(one.detach().flatten(0, 1), torch.stack([p.detach() for p in each]))
