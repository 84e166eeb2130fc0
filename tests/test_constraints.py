"""constraint="normalize": a bound that is approached as steps go on, by vectors that are state."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import orthonorm
import pytest
import torch
from orthonorm import optim
from orthonorm.optim.constraints import POWER_STEPS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

VECTOR = "constraint_vector"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norms(W: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(W.detach().double(), 2)


def stepped(opt: Any, params: list[nn.Parameter], seed: int) -> None:
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=100 * seed + i, dtype=p.dtype)
    opt.step()


def test_the_bound_is_approached() -> None:
    """A Gaussian has the dense spectrum at its edge that power steps are slowest on."""
    W = randn(256, 256) / 16
    p = nn.Parameter(W.clone())
    opt = optim.Signum([p], lr=0.0, weight_decay=0.0, constraint="normalize")
    found = []
    for t in range(10):
        stepped(opt, [p], t)
        found.append(norms(p).item())
    assert all(b <= a for a, b in itertools.pairwise(found)) and found[-1] >= 1.0
    for t, value in enumerate(found, 1):  # as exact as the power steps of all steps together
        together = orthonorm.spectral_norm(W, POWER_STEPS * t)
        assert value <= (norms(W) / together).item() * (1 + 1e-4)
    assert found[0] > 1.01 > 1.003 > found[-1]


def test_a_moving_weight_stays_near_the_bound() -> None:
    p = nn.Parameter(randn(200, 120, dtype=torch.float32) / 20)
    s = 0.5 * (200 / 120) ** 0.5
    opt = optim.Muon([p], lr=0.02, constraint="normalize", bound=0.5)
    for t in range(12):
        stepped(opt, [p], t)
        assert t < 3 or norms(p) <= 1.01 * s
    assert norms(p) >= 0.98 * s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_view_has_its_vector(dtype: torch.dtype) -> None:
    """Heads, fused pieces, convolutions, experts; what is below the bound stays, bit for bit."""
    params = [nn.Parameter(randn(*s, seed=i, dtype=dtype)) for i, s in
              enumerate(((12, 10), (4, 3, 3, 3), (2, 6, 5), (6, 6)))]  # fmt: skip
    fused, conv, experts, small = params
    with torch.no_grad():
        small.mul_(1e-3)
    before = small.detach().clone()
    groups = [dict(params=[fused], split=(8, 4), heads=(2, 1)), dict(params=[conv, experts, small])]
    opt = optim.Signum(groups, lr=0.0, weight_decay=0.0, constraint="normalize", bound=0.25)
    for t in range(12):
        stepped(opt, params, t)
    assert opt.state[fused][f"{VECTOR}.0"].shape == (2, 10)
    assert opt.state[fused][f"{VECTOR}.1"].shape == (1, 10)
    assert opt.state[conv][VECTOR].shape == (27,) and opt.state[experts][VECTOR].shape == (2, 5)
    slack = 1 + 4 * torch.finfo(dtype).eps
    for W in (fused[:4], fused[4:8], fused[8:], conv.flatten(1), *experts):
        s = 0.25 * (W.shape[0] / W.shape[1]) ** 0.5
        assert norms(W) <= s * (1.001 * slack)
    assert torch.equal(small, before)


def test_state_is_saved_and_loaded() -> None:
    made = []
    for _ in range(2):
        p = nn.Parameter(randn(30, 20))
        made.append((optim.Muon([p], lr=0.05, constraint="normalize", bound=0.5), p))
    (first, p), (second, q) = made
    for t in range(3):
        stepped(first, [p], t)
    saved = copy.deepcopy(first.state_dict())
    assert saved["state"][0][VECTOR].norm() == pytest.approx(1.0)
    second.load_state_dict(saved)
    with torch.no_grad():
        q.copy_(p)
    for t in range(3, 6):
        stepped(first, [p], t)
        stepped(second, [q], t)
    assert torch.equal(p, q)


def test_it_may_begin_and_end_with_any_step_and_without_saved_vectors() -> None:
    p, q = (nn.Parameter(randn(9, 6)) for _ in range(2))
    opt = optim.Muon([p], lr=0.05)
    stepped(opt, [p], 0)
    later = optim.Muon([q], lr=0.05, constraint="normalize", bound=0.5)
    later.load_state_dict({**(saved := copy.deepcopy(opt.state_dict())), "param_groups": [
        {**saved["param_groups"][0], "constraint": "normalize", "bound": 0.5}]})  # fmt: skip
    with torch.no_grad():
        q.copy_(p)
    opt.param_groups[0].update(constraint="normalize", bound=0.5)
    for t in range(1, 4):
        stepped(opt, [p], t)
        stepped(later, [q], t)
    assert torch.equal(p, q) and norms(p) <= 0.5 * 1.5**0.5 * 1.01
    opt.param_groups[0]["constraint"] = None
    stepped(opt, [p], 4)


def test_zeros_and_nan_stay_in_their_matrices() -> None:
    p = nn.Parameter(randn(3, 6, 5))
    with torch.no_grad():
        p[1] = 0
    opt = optim.Signum([p], lr=0.0, weight_decay=0.0, constraint="normalize", bound=0.25)
    stepped(opt, [p], 0)
    kept = opt.state[p][VECTOR].clone()
    with torch.no_grad():
        p[2, 0, 0] = torch.nan
    stepped(opt, [p], 1)
    assert norms(p[0]).isfinite() and not p[1].any() and p[2].isnan().all()
    assert opt.state[p][VECTOR].isfinite().all() and kept.isfinite().all()


def test_in_one_graph() -> None:
    p, q = (nn.Parameter(randn(30, 20)) for _ in range(2))
    ours, eager = (optim.Muon([x], lr=0.05, constraint="normalize", bound=0.5) for x in (p, q))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(ours.step, fullgraph=True, backend=counter)
    graphs = 0
    for t in range(5):
        for x in (p, q):
            x.grad = randn(30, 20, seed=t)
        step()
        eager.step()
        assert torch.equal(p, q)
        graphs = counter.frame_count if t == 2 else graphs
    assert counter.frame_count == graphs > 0
