"""orthonorm.distributed.GradScaler in one process; distributed_layouts.py has it on ranks."""

from __future__ import annotations

import math

import pytest
import torch
from orthonorm import optim
from orthonorm.distributed import GradScaler
from test_amp import parameters, set_grads


@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_of_ranks_is_torchs_in_one_process(fused: bool) -> None:
    found = []
    for kind in (torch.amp.GradScaler, GradScaler):
        params = parameters()
        opt, scaler = optim.Muon(params, fused=fused), kind("cpu", init_scale=1000.0)
        scaler.scale(torch.zeros(()))
        for step, scale in enumerate((1000.0, math.inf, 500.0)):
            set_grads(step, params, scale=scale)
            scaler.step(opt)
            scaler.update()
        found.append((params, scaler.state_dict()))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(p, q) for p, q in zip(found[0][0], found[1][0], strict=True))


def test_a_rank_without_gradients_does_not_end_the_scalers_step() -> None:
    """torch's raises there, while the others wait."""
    params = parameters()
    opt, scaler = optim.Muon(params), GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(opt)
    scaler.update()
    assert not opt.state and scaler.get_scale() == 2.0**16
