"""Mantissas of AdamW's groups: models of bfloat16 that train as those of float32, to the bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make
from orthonorm import optim
from orthonorm._library import OPS
from orthonorm.ops.mantissa import joined
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KEPT = [row for row in ROWS if optim.REGISTRY[row.name].mantissas]


class Net(nn.Module):
    """What a transformer has: embedding, hidden matrices, gains, biases, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)
        self.head = nn.Linear(16, 19)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y + self.down(torch.tanh(self.up(self.norm(y)))))


def nets() -> tuple[Net, Net]:
    """The same weights in bfloat16 and in float32."""
    torch.manual_seed(0)
    half = Net().to(BF16)
    wide = Net()
    wide.load_state_dict({k: t.float() for k, t in half.state_dict().items()})
    return half, wide


def set_grads(step: int, *lists: Any) -> None:
    for params in lists:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            grad = 1e-2 * torch.randn(p.shape, generator=generator)
            p.grad = grad.to(BF16).to(p.dtype)


def run(opt: Any, steps: range) -> None:
    for step in steps:
        set_grads(step, [p for group in opt.param_groups for p in group["params"]])
        opt.step()


def number(opt: Any, p: Tensor) -> Tensor:
    """The float32 weight that a parameter and its mantissa are."""
    return joined(p.detach(), opt.state[p]["mantissa"]) if p.dtype == BF16 else p.detach()


def check_same(a: Any, b: Any) -> None:
    """Weights and state of `b`, of float32, are what the halves and the state of `a` are."""
    pairs = zip(a.param_groups, b.param_groups, strict=True)
    for p, q in ((p, q) for x, y in pairs for p, q in zip(x["params"], y["params"], strict=True)):
        assert torch.equal(number(a, p), q)
        assert a.state[p].keys() - {"mantissa"} == b.state[q].keys()
        for key, t in b.state[q].items():
            mine = a.state[p][key]
            same = torch.equal(mine, t) and mine.dtype == t.dtype if key != "step" else mine == t
            assert same, key


@pytest.mark.parametrize("row", KEPT, ids=lambda r: r.name)
def test_matrices_are_float32s(row: Row) -> None:
    """Every rule, to the bit; SSO, Conda and StiefelAdam, which write weights, refuse mantissas."""
    shapes = ((24, 40), (40, 24), (3, 8, 20))
    half = make(BF16, shapes)
    wide = [nn.Parameter(p.detach().float()) for p in half]
    a, b = build(row, half, mantissa=True), build(row, wide)
    for opt in (a, b):
        run(opt, range(4))
    check_same(a, b)


def test_composite_decay_reads_mantissas() -> None:
    for norm in ("max", "frobenius"):
        half = make(BF16, ((24, 40), (40, 24)))
        wide = [nn.Parameter(p.detach().float()) for p in half]
        settings: dict[str, Any] = dict(decay="composite", weight_decay=0.1, norm=norm)
        a = optim.TrustRegion(half, mantissa=True, **settings)
        b = optim.TrustRegion(wide, **settings)
        for opt in (a, b):
            run(opt, range(4))
        check_same(a, b)


ADAMW: dict[str, dict[str, Any]] = {
    "default": {},
    "maximize": dict(maximize=True, betas=(0.8, 0.9), weight_decay=0.3),
    "float32 said twice": dict(state_dtype="float32"),
}


@pytest.mark.parametrize("kind", ADAMW)
def test_adamw_is_float32s(kind: str) -> None:
    """To the bit, over a state dict through torch.save, and a deepcopy."""
    half, wide = nets()
    settings = dict(lr=1e-3, **ADAMW[kind])
    a = optim.AdamW(half.parameters(), mantissa=True, **settings)
    b = optim.AdamW(wide.parameters(), **settings)
    for opt in (a, b):
        run(opt, range(3))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    c = optim.AdamW(half.parameters(), mantissa=True, **settings)
    c.load_state_dict(torch.load(file, weights_only=True))
    check_same(c, b)
    d = copy.deepcopy(c)
    for opt in (b, c, d):
        run(opt, range(3, 6))
    check_same(c, b)
    check_same(d, b)


@pytest.mark.parametrize("name", ["muon", "normuon", "scion", "soap"])
def test_a_model_of_bfloat16_trains_as_one_of_float32(name: str) -> None:
    """The companion has the rule's mantissas: gains move at lr 1e-3, where bfloat16 ones alone
    stand still."""
    half, wide = nets()
    settings: dict[str, Any] = dict(lr=1e-3, adamw=dict(lr=1e-3), report=None)
    a = optim.configure(half, name, mantissa=True, **settings)
    b = optim.configure(wide, name, **settings)
    assert {g["rule"] for g in a.param_groups} == {"matrix", "adamw"}
    before = [p.detach().clone() for p in wide.parameters()]
    for opt in (a, b):
        run(opt, range(6))
    check_same(a, b)
    assert not any(torch.equal(p, old) for p, old in zip(wide.parameters(), before, strict=True))
    alone = nets()[0]
    plain = optim.configure(alone, name, **settings)
    before = [p.detach().clone() for p in alone.parameters()]
    run(plain, range(6))
    assert torch.equal(alone.norm.weight, before[1])  # bfloat16 has none from 0.996 to 1


def test_the_companion_may_have_none_or_alone() -> None:
    groups = optim.split_params(nets()[0])
    opt = optim.Muon(groups, mantissa=True, adamw=dict(mantissa=False))
    run(opt, range(2))
    for group in opt.param_groups:
        assert all(
            ("mantissa" in opt.state[p]) == (group["rule"] == "matrix") for p in group["params"]
        )
    half, wide = nets()
    companion = dict(weight_decay=0.1, lr=1e-3, betas=(0.9, 0.99))
    a = optim.Conda(optim.split_params(half), adamw=dict(companion, mantissa=True))
    b = optim.Conda(optim.split_params(wide), adamw=companion)
    for opt in (a, b):
        run(opt, range(3))
    for x, y in zip(a.param_groups, b.param_groups, strict=True):
        if x["rule"] == "adamw":  # which decays last, and has another eps
            for p, q in zip(x["params"], y["params"], strict=True):
                assert torch.equal(number(a, p), q)


def test_other_dtypes_in_the_group_are_as_they_were() -> None:
    """Float16 and float32 have no mantissas; each parameter as in a group of its own."""

    def made(which: slice) -> tuple[list[nn.Parameter], Any]:
        kinds = zip(make(F32, ((9, 5), (7,), (4, 4), (6,))), (BF16, F32, F16, BF16), strict=True)
        params = [nn.Parameter(p.detach().to(dtype)) for p, dtype in kinds]
        return params, optim.AdamW(params[which], lr=1e-2, mantissa=True)

    params, opt = made(slice(4))
    for step in range(3):
        set_grads(step, params)
        opt.step()
    assert ["mantissa" in opt.state[p] for p in params] == [True, False, False, True]
    for i, p in enumerate(params):
        fresh, alone = made(slice(i, i + 1))
        for step in range(3):
            set_grads(step, fresh)
            alone.step()
        assert torch.equal(p, fresh[i])
        for key, t in alone.state[fresh[i]].items():
            assert torch.equal(t, opt.state[p][key])


@pytest.mark.parametrize("theirs", [{}, {"state_dtype": "8bit"}, {"mantissa": True}])
def test_loading_keeps_what_was_asked_for(theirs: dict[str, Any]) -> None:
    """From one without mantissas, from torch's, from one of small state; and back."""
    half = nets()[0]
    saved = []
    for opt in (optim.AdamW(half.parameters(), **theirs), torch.optim.AdamW(half.parameters())):
        run(opt, range(1))
        saved.append(opt.state_dict())
    for state in saved:
        opt = optim.AdamW(half.parameters(), mantissa=True)
        opt.load_state_dict(copy.deepcopy(state))
        run(opt, range(1, 2))
        assert opt.param_groups[0]["mantissa"] and opt.param_groups[0]["state_dtype"] is None
        for s in opt.state.values():
            kinds = [s[key].dtype for key in ("mantissa", "exp_avg", "exp_avg_sq")]
            assert kinds == [torch.int16, F32, F32]
        back = optim.AdamW(half.parameters(), **theirs)
        back.load_state_dict(opt.state_dict())
        run(back, range(2, 3))
        assert all(("mantissa" in s) == ("mantissa" in theirs) for s in back.state.values())


def test_others_state_is_converted_beside_mantissas() -> None:
    params = make(BF16, ((8, 6), (6, 8)))
    saved = {
        "state": {i: {"momentum_buffer": torch.randn_like(p)} for i, p in enumerate(params)},
        "param_groups": [{"lr": 0.05, "weight_decay": 0.0, "momentum": 0.9, "params": [0, 1]}],
    }
    for kind in ({"mantissa": True}, {"state_dtype": "8bit"}, {"state_dtype": "float32"}):
        opt = optim.Muon(params, **kind)
        opt.load_state_dict(optim.convert_state_dict(saved, "keller", opt, params))
        run(opt, range(1))


@pytest.mark.parametrize("how", ["skip", "found_inf"])
def test_a_skipped_step_leaves_everything(how: str) -> None:
    half = nets()[0]
    more: dict[str, Any] = {"nonfinite": "skip"} if how == "skip" else {"fused": True}
    opt = optim.AdamW(half.parameters(), mantissa=True, **more)
    run(opt, range(2))
    params = list(half.parameters())
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy([dict(opt.state[p]) for p in params])
    set_grads(2, params)
    for p in params:
        p.grad.view(-1)[0] = float("inf")
    if how == "found_inf":
        assert opt._step_supports_amp_scaling
        opt.found_inf = torch.tensor(1.0)
    opt.step()
    for p, old, s in zip(params, before, state, strict=True):
        assert torch.equal(p, old) and all(torch.equal(opt.state[p][k], t) for k, t in s.items())


@pytest.mark.parametrize("dtype", [F32, BF16, torch.int32])
def test_a_mantissa_is_int16(dtype: torch.dtype) -> None:
    """Loaded or put in its place by hand: refused, and everything is as it was."""
    (p,) = params = make(BF16, ((5, 4),))
    opt = optim.AdamW([("first", p)], mantissa=True)
    run(opt, range(1))
    before, kept = p.detach().clone(), opt.state[p]["mantissa"]
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["mantissa"] = kept.to(dtype)
    rule = "AdamW: parameter 'first': state 'mantissa' must be int16, got"
    with pytest.raises(TypeError, match=rule):
        opt.load_state_dict(saved)
    assert opt.state[p]["mantissa"] is kept
    opt.state[p]["mantissa"] = kept.to(dtype)
    set_grads(1, params)
    with pytest.raises(TypeError, match=rule):
        opt.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"mantissa": "yes"}, "mantissa must be one of"), ({"mantissa": 2}, "mantissa must be one of"),
     ({"mantissa": True, "state_dtype": "8bit"}, "None or 'float32' with mantissa=True"),
     ({"mantissa": True, "state_dtype": "bfloat16"}, "None or 'float32' with mantissa=True")],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"AdamW: .*{word}"):
        optim.AdamW(make(BF16, ((3, 4),)), **settings)
    with pytest.raises(ValueError, match=f"Muon: .*{word}"):
        optim.Muon(make(BF16, ((3, 4),)), adamw=settings)
    for name in ("SSO", "Conda", "StiefelAdam"):
        with pytest.raises(ValueError, match=f"{name}: mantissa must be False"):
            optim.REGISTRY[name](make(BF16, ((3, 4),)), mantissa=True)


# ---- the op ------------------------------------------------------------------------------------


def arguments(**given: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(
        params=[torch.ones(3, 4, dtype=BF16)], grads=[torch.ones(3, 4)],
        exp_avg=[torch.zeros(3, 4)], exp_avg_sq=[torch.zeros(3, 4)], steps=[torch.tensor(0.0)],
        lr=torch.tensor(0.1), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=torch.tensor(0.0),
        mantissas=[torch.zeros(3, 4, dtype=torch.int16)],
    )  # fmt: skip
    return found | given


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"mantissas": [torch.zeros(3, 4)]}, TypeError, r"mantissas\[0\] must be torch.int16"),
        ({"mantissas": [torch.zeros(3, 5, dtype=torch.int16)]}, ValueError, "shape"),
        ({"mantissas": []}, ValueError, "equal lengths"),
        ({"rounding": torch.tensor(1)}, ValueError, "rounding must be None"),
        ({"params": [torch.ones(3, 4)]}, TypeError, r"params\[0\] must be torch.bfloat16"),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], match: str) -> None:
    every = arguments(**given)
    with pytest.raises(error, match=f"adamw_step_: .*{match}"):
        OPS["adamw_step_"](**every)
    assert every["steps"][0] == 0 and (every["params"][0] == 1).all()
    if "rounding" in given:
        return
    with pytest.raises(RuntimeError):  # what the kernel itself keeps to, where nobody has checked
        OPS["adamw_step_"].overload(**every)
    assert every["steps"][0] == 0 and (every["params"][0] == 1).all()


def test_opcheck() -> None:
    torch.library.opcheck(OPS["adamw_step_"].overload, (), arguments())


@pytest.mark.parametrize("make_one", [optim.AdamW, optim.Muon, optim.NorMuon])
@pytest.mark.parametrize(
    "kind",
    [{"mantissa": True}, {"state_dtype": "float32"}, {"stochastic_rounding": True}],
    ids=str,
)
def test_one_graph(make_one: Any, kind: dict[str, Any]) -> None:
    """For six rates in a tensor."""
    torch._dynamo.reset()
    params, twins = (make(BF16, ((9, 5), (7, 4))) for _ in range(2))
    lr = torch.tensor(0.01)
    a, b = (make_one(ps, lr=lr, **kind) for ps in (params, twins))
    run(a, range(1))
    run(b, range(1))
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(a.step, fullgraph=True, backend=counter)
    for i in range(1, 7):
        set_grads(i, params, twins)
        lr.fill_(0.01 * i)
        step()
        b.step()
    assert counter.frame_count == 1
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(a.state[p][key], t) for key, t in b.state[q].items())
