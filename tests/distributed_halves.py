"""Cases of tests/test_distributed.py: bfloat16 parameters with float32 state, and mantissas."""

from __future__ import annotations

import copy
from typing import Any

import torch
from distributed_pairs import OPTIMIZERS, counted, pair, parameters, same, set_gradients
from distributed_registry import Context, case, device_mesh, put, raises
from orthonorm import optim
from orthonorm.distributed import comm_report
from torch import nn
from torch.distributed.tensor import Shard

BF16 = torch.bfloat16
FLOAT32: dict[str, Any] = {"state_dtype": "float32"}


@case(2)
def float32_state_is_that_of_one_process(context: Context) -> None:
    """Weights and state, bit for bit: with owners, on rows, and where a stack stays whole."""
    mesh = device_mesh("cpu", (2,))
    for name in OPTIMIZERS:
        for places in ([Shard(0)], [Shard(1)]):
            a, b = pair(name, mesh, places, dtype=BF16, **FLOAT32)
            for step in range(2):
                set_gradients(step, a, b)
                if step == 0:
                    report = comm_report(a)
                    found = counted(a.step)
                    assert found[:2] == (report.sent, report.received), (name, places)
                else:
                    a.step()
                b.step()
            try:
                same(a, b)
            except AssertionError as error:
                raise AssertionError(f"{name}, {places}: {error}") from error
            kinds = {t.dtype for s in a.state.values() for k, t in s.items() if k != "step"}
            assert kinds <= {torch.float32}, (name, kinds)


@case(2)
def float32_state_is_loaded_as_it_was_saved(context: Context) -> None:
    """To the bit, and from an optimizer without; AdamW's too."""
    mesh = device_mesh("cpu", (2,))
    for name in ("NorMuon", "Conda"):
        a, b = pair(name, mesh, [Shard(0)], dtype=BF16, **FLOAT32)
        set_gradients(0, a, b)
        a.step()
        fresh, plain = (pair(name, mesh, [Shard(0)], dtype=BF16, **k)[0] for k in (FLOAT32, {}))
        fresh.load_state_dict(copy.deepcopy(a.state_dict()))
        plain.load_state_dict(copy.deepcopy(a.state_dict()))
        for p, q, r in zip(*map(parameters, (a, fresh, plain)), strict=True):
            for key, t in a.state[p].items():
                if key != "step":
                    assert t.dtype == torch.float32 == fresh.state[q][key].dtype
                    assert torch.equal(t.to_local(), fresh.state[q][key].to_local())
                    assert plain.state[r][key].dtype == BF16
                    assert fresh.state[q][key].placements == t.placements
        set_gradients(1, fresh, b)
        fresh.step()
        plain.load_state_dict(fresh.state_dict())


@case(2)
def ranks_agree_on_the_dtype_of_state(context: Context) -> None:
    kind = "float32" if context.rank else None
    mesh = device_mesh("cpu", (2,))
    p = nn.Parameter(put(torch.ones(8, 6, dtype=BF16), mesh, [Shard(0)]))
    opt = optim.Muon([("w", p)], state_dtype=kind)
    p.grad = put(torch.ones(8, 6, dtype=BF16), mesh, [Shard(0)])
    raises(opt.step, "same parameters in the same order", "state_dtype", "'w'")
    assert not opt.state and torch.equal(p.to_local(), torch.ones_like(p.to_local()))
