"""Weight decay as a tensor: the bits of the number, in every optimizer and kind of decay; what a
number costs a step; and what ops refuse."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, set_grads, snapshot
from orthonorm import optim
from orthonorm.bench.cases import CASES
from orthonorm.bench.inputs import Inputs
from test_amp import HostReads
from test_ops import LIST, made
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DECAYS = (0.1, 0.37, 0.0, 2.5)
OPS = ("adamw_step_", "conda_step_", "decayed_update_", "muon_step_", "normuon_step_",
       "signum_step_")  # fmt: skip


def tensor(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def check_same(numbers: Any, tensors: Any, decays: tuple[float, ...] = DECAYS) -> None:
    """Steps of two optimizers, one told by numbers and one by tensors that change in place."""
    groups = tensors.param_groups
    for group in groups:
        if "weight_decay" in group:
            group["weight_decay"] = tensor(7.0)
    params = [[p for group in opt.param_groups for p in group["params"]]
              for opt in (numbers, tensors)]  # fmt: skip
    before = snapshot(numbers)[: len(params[0])]
    for i, decay in enumerate(decays):
        set_grads(i, *params)
        for mine, theirs in zip(numbers.param_groups, groups, strict=True):
            if "weight_decay" in theirs:
                mine["weight_decay"] = decay
                theirs["weight_decay"].fill_(decay)
        numbers.step()
        tensors.step()
        pairs = zip(snapshot(numbers), snapshot(tensors), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), (i, decay)
    assert not all(map(torch.equal, params[0], before))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_tensor_has_the_bits_of_its_number(row: Row) -> None:
    """With vectors and an embedding by AdamW's rule beside the matrices."""

    def both() -> Any:
        matrices, others = make(torch.float32), make(torch.float32, ((11,), (12, 5)))
        return build(row, [{"params": matrices}, {"params": others, "rule": "adamw"}])

    check_same(both(), both())


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cautious": (optim.Muon, dict(decay="cautious")),
    "clipped": (optim.Muon, dict(decay="clipped", bound=0.3)),
    "clipped NorMuon": (optim.NorMuon, dict(decay="clipped", bound=0.3)),
    "heavy ball": (optim.Muon, dict(heavy_ball=True)),
    **{
        f"composite {norm}": (optim.TrustRegion, dict(decay="composite", norm=norm))
        for norm in ("spectral", "max", "frobenius")
    },
}


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "mantissa", "8bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_decay(kind: str, storage: str) -> None:
    make_one, settings = KINDS[kind]
    dtype = torch.float32 if storage in ("float32", "8bit") else torch.bfloat16
    more: dict[str, Any] = {"mantissa": True} if storage == "mantissa" else {}
    more |= {"state_dtype": "8bit"} if storage == "8bit" else {}
    check_same(*(make_one(make(dtype), lr=0.05, **settings, **more) for _ in range(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_decay_adds_nothing(kind: str) -> None:
    """Not even of weights whose decay would be infinite: a number 0 never looks at them."""
    make_one, settings = KINDS[kind]
    mine = make(torch.float32)
    mine[0].data[2, 3] = torch.inf
    opt = make_one(mine, lr=0.05, weight_decay=0.0, **settings)
    set_grads(0, mine)
    opt.step()
    assert mine[0][2, 3] == torch.inf and int((~mine[0].isfinite()).sum()) == 1


@pytest.mark.parametrize("kind", ["cautious", "composite max", "composite frobenius"])
def test_the_host_reads_no_tensor(kind: str) -> None:
    make_one, settings = KINDS[kind]
    params = make(torch.float32)
    opt = make_one(params, lr=tensor(0.05), weight_decay=tensor(0.1), **settings)
    for i in range(2):
        set_grads(i, params)
        with HostReads():
            opt.step()


def test_a_float32_tensor_is_its_own_number() -> None:
    """0.1 in float32 is another number than in float64; groups of a copy and of a file keep it."""
    mine, theirs = (make(torch.float32) for _ in range(2))
    a = optim.AdamW(mine, weight_decay=tensor(0.1, torch.float32))
    b = optim.AdamW(theirs, weight_decay=float(tensor(0.1, torch.float32)))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert isinstance(b.param_groups[0]["weight_decay"], Tensor)
    b.param_groups[0]["weight_decay"] = float(tensor(0.1, torch.float32))
    set_grads(0, mine, theirs)
    a.step()
    b.step()
    assert all(map(torch.equal, mine, theirs))


class Calls(TorchDispatchMode):
    """Counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def calls(opt: Any) -> dict[str, int]:
    with Calls() as counted:
        opt.step()
    return {k: n for k, n in counted.found.items() if not k.startswith("profiler::")}


@pytest.mark.parametrize(
    ("name", "op"),
    [("AdamW", "adamw_step_"), ("Muon", "muon_step_"), ("NorMuon", "normuon_step_"),
     ("Signum", "signum_step_")],
)  # fmt: skip
def test_a_number_that_stays_costs_nothing(name: str, op: str) -> None:
    """A step of 28 parameters is one call of its op, and one more for each number that is new."""
    params = make(torch.float32, ((6, 4), (4, 6)) * 14)
    opt = optim.REGISTRY[name](params, lr=0.01, weight_decay=0.1)
    set_grads(0, params)
    for _ in range(2):  # the second checks the state that the first made
        opt.step()
    alone = {f"orthonorm::{op}": 1}
    assert calls(opt) == alone
    (group,) = opt.param_groups
    group["weight_decay"] = 0.2
    assert calls(opt) == {**alone, "aten::mul": 1}
    assert calls(opt) == alone
    group["lr"], group["weight_decay"] = 0.02, 0.1
    assert calls(opt) == {**alone, "aten::mul": 1}  # that decay was seen before


def test_schedules_do_not_fill_memory() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    opt = optim.AdamW([p])
    for i in range(200):
        opt.param_groups[0].update(lr=0.1 / (i + 1), weight_decay=0.01 * i)
        opt.step()
    assert len(opt.number._kept) <= opt.number.KEPT


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (0.1, TypeError, "weight_decay must be a Tensor, got float"),
        (torch.tensor(1), TypeError, "weight_decay must be float32"),
        (torch.ones(2), ValueError, "weight_decay must have one element"),
        (torch.ones((), device="meta"), ValueError, "meta"),
    ],
)
def test_ops_refuse(name: str, value: Any, error: type[Exception], match: str) -> None:
    arguments = made(CASES[name], LIST[:2], Inputs())
    before = [p.clone() for p in arguments["params"]]
    with pytest.raises(error, match=f"{name}: .*{match}"):
        CASES[name].op(**{**arguments, "weight_decay": value})
    assert all(map(torch.equal, arguments["params"], before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rates_of_16_bits_are_their_numbers(row: Row, dtype: torch.dtype) -> None:
    """An op that refused them would do so behind others that have written state."""
    numbers, tensors = (build(row, make(torch.float32)) for _ in range(2))
    for mine, theirs in zip(numbers.param_groups, tensors.param_groups, strict=True):
        for key in ("lr", "weight_decay"):
            if key in mine:
                theirs[key] = tensor(0.1, dtype)
                mine[key] = float(theirs[key])
    params = [[p for group in opt.param_groups for p in group["params"]]
              for opt in (numbers, tensors)]  # fmt: skip
    for i in range(2):
        set_grads(i, *params)
        numbers.step()
        tensors.step()
    assert all(map(torch.equal, snapshot(numbers), snapshot(tensors)))
