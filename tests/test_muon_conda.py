"""What is particular to Muon and Conda: torch's Muon to the bit of bfloat16, rotated momentum."""

from __future__ import annotations

import copy

import pytest
import torch
from optimizer_rows import make, set_grads
from orthonorm import optim
from torch import nn
from trusted import TrustedMuon

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
