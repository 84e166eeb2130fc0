"""State in bfloat16 and in 8 bits, of every optimizer: size, loss of accuracy, saving, skipping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, reloaded, set_grads, snapshot
from orthonorm import ops, optim
from orthonorm.ops import blocks, steps
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

SHAPES = ((24, 40), (40, 24), (32, 32))
KINDS: dict[str, dict[str, Any]] = {
    "8bit": dict(state_dtype="8bit"),
    "bfloat16": dict(state_dtype="bfloat16"),
    "stochastic": dict(state_dtype="bfloat16", stochastic_rounding=True),
}
EACH = pytest.mark.parametrize("kind", KINDS)
ALL = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


def run(opt: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(step, params)
        opt.step()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def elementwise(opt: Any) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for group in opt.param_groups:
        names = ("exp_avg", "exp_avg_sq")
        names = names if group["rule"] == "adamw" else opt.elementwise_state(group)
        for p in group["params"]:
            for key in names:
                found.setdefault(key, []).append(opt.state[p][key])
    return found


@ALL
@EACH
def test_saving_goes_on_to_the_bit(row: Row, kind: str) -> None:
    """Through torch.save and load(weights_only=True), and deepcopy; state is kept as was asked."""
    params, fresh = make(torch.float32, SHAPES), make(torch.float32, SHAPES)
    a, b = build(row, params, **KINDS[kind]), build(row, fresh, **KINDS[kind])
    run(a, params, range(2))
    wanted = torch.uint8 if kind == "8bit" else torch.bfloat16
    assert all(t.dtype == wanted for ts in elementwise(a).values() for t in ts)
    reloaded(a, b)
    assert same(snapshot(a), snapshot(b))
    c = copy.deepcopy(a)
    for opt in (a, b, c):
        run(opt, opt.param_groups[0]["params"], range(2, 4))
    assert same(snapshot(a), snapshot(b)) and same(snapshot(a), snapshot(c))
    assert all(p.isfinite().all() for p in params)


@ALL
def test_float_state_loads_into_8_bits_and_back(row: Row) -> None:
    params = make(torch.float32, SHAPES)
    a, b, c = (
        build(row, make(torch.float32, SHAPES), **more)
        for more in ({}, dict(state_dtype="8bit"), {})
    )
    run(a, a.param_groups[0]["params"], range(3))
    b.load_state_dict(a.state_dict())
    c.load_state_dict(b.state_dict())
    assert b.param_groups[0]["state_dtype"] == "8bit" and c.param_groups[0]["state_dtype"] is None
    assert [s.keys() for s in c.state.values()] == [s.keys() for s in a.state.values()]
    for key, tensors in elementwise(a).items():
        for x, y in zip(tensors, elementwise(c)[key], strict=True):
            assert x.dtype == y.dtype and (x - y).abs().max() <= 0.0071 * x.abs().max()
    assert len(params) == len(a.state)


@ALL
@pytest.mark.parametrize("kind", ["as computed", *KINDS])
def test_skipped_steps_leave_state_as_it_was(row: Row, kind: str) -> None:
    """Of all parameters, and of one beside others that move."""
    params = make(torch.float32, SHAPES)
    opt = build(row, params, nonfinite="skip", **KINDS.get(kind, {}))
    run(opt, params, range(2))
    for bad in (params, params[1:2]):
        kept = [copy.deepcopy(dict(opt.state[p])) for p in bad]
        weights, first = [p.detach().clone() for p in bad], params[0].detach().clone()
        set_grads(2, params)
        for p in bad:
            p.grad[0, 0] = float("nan")
        opt.step()
        assert same(weights, [p.detach() for p in bad])
        for p, state in zip(bad, kept, strict=True):
            assert opt.state[p].keys() == state.keys()
            assert all(
                torch.equal(opt.state[p][k], v) if isinstance(v, Tensor) else opt.state[p][k] == v
                for k, v in state.items()
            )
    assert not torch.equal(params[0], first) and opt.param_groups[0]["skipped"] == 4


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_views_and_companion(kind: str, dtype: torch.dtype) -> None:
    """Fused heads, stacks, convolutions, vectors in channels_last: finite, and saved to the bit."""

    def made() -> tuple[list[nn.Parameter], Any]:
        params = make(dtype, ((24, 8), (3, 8, 20), (6, 5, 3, 3), (7,), (6, 5, 3, 3)))
        for i in (2, 4):
            params[i] = nn.Parameter(params[i].detach().to(memory_format=torch.channels_last))
        groups = [
            {"params": params[:1], "split": (8, 16), "heads": (2, 2)},
            {"params": params[1:3]},
            {"params": params[3:], "rule": "adamw"},
        ]
        return params, optim.NorMuon(groups, **KINDS[kind])

    (params, a), (fresh, b) = made(), made()
    run(a, params, range(3))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            q.copy_(p)
    run(a, params, range(3, 5))
    run(b, fresh, range(3, 5))
    assert same(snapshot(a), snapshot(b)) and all(p.isfinite().all() for p in params)


def coded(x: Tensor, signed: bool, backend: str = "kernel") -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of a matrix, and what they stand for, in its layout."""
    codes = torch.full_like(x, 77, dtype=torch.uint8)
    scales, back = torch.full(blocks.scales_shape(x.shape), 7.0), torch.full_like(x, 7.0)
    calls = [ops.quantize_blocks_, ops.dequantize_blocks_]
    quantize, dequantize = (op if backend == "kernel" else op.reference for op in calls)
    quantize([codes], [scales], [x], signed)
    dequantize([back], [codes], [scales], signed)
    return codes, scales, back


AWKWARD = {
    "normal": lambda x, e: x,
    "denormal": lambda x, e: x * 1e-41,
    "huge": lambda x, e: x * 1e37,  # of float64 and bfloat16; infinite in float16
    "decades": lambda x, e: x * torch.exp2(-40 * torch.rand(x.shape, dtype=x.dtype)),
    "zeros": lambda x, e: -x * 0,
    "ties": lambda x, e: torch.where(x == x.max(), 1.0, e[torch.randint(0, len(e), x.shape)]),
    "nan": lambda x, e: torch.where(x == x.max(), float("nan"), x),
    "inf": lambda x, e: torch.where(x == x.max(), -float("inf"), x),
}


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", AWKWARD)
def test_kernels_codes_are_the_definitions(kind: str, signed: bool) -> None:
    """Bit for bit, at ties of the float32 quotient and beside them, and of what is not finite."""
    table = torch.tensor(blocks.values(signed))
    ties = (table[1:] + table[:-1]) / 2
    both = [torch.nextafter(ties, torch.tensor(end)) for end in (-2.0, 2.0)]
    edges = torch.cat([ties, *both]).double()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape in ((1, 1), (3, 4, 7), (16, 16), (33, 100), (2, 3, 17, 19)):
            x = AWKWARD[kind](torch.randn(shape, dtype=torch.float64), edges).to(dtype)
            for given in (x, x.mT.contiguous().mT):
                pairs = zip(coded(given, signed), coded(given, signed, "reference"), strict=True)
                for mine, wanted in pairs:
                    torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values(signed: bool) -> None:
    x = torch.randn(2, 19, 31) if signed else torch.rand(2, 19, 31) ** 6
    x[1, 3] = 0
    _, scales, back = coded(x, signed)
    table = torch.tensor(blocks.values(signed))
    flat = x.flatten(1)
    for i, start in enumerate(range(0, 19 * 31, blocks.BLOCK)):
        part = flat[:, start : start + blocks.BLOCK]
        top = part.abs().amax(1, keepdim=True)
        assert torch.equal(scales[:, i : i + 1], top)
        off = (part.unsqueeze(-1) - table * top.unsqueeze(-1)).abs().amin(-1)
        mine = (part - back.flatten(1)[:, start : start + blocks.BLOCK]).abs()
        small = torch.zeros_like(part, dtype=torch.bool) if signed else part < 1e-7 * top
        assert bool((mine <= off + 1e-6 * top)[~small].all())
    assert not bool(back[1, 3].any())
    assert signed or bool((back[x > 0] > 0).all())


def test_the_map_is_of_256_values_as_published() -> None:
    for signed, low in ((True, -0.99296875), (False, 0.0)):
        values = blocks.values(signed)
        assert len(set(values)) == 256 and values[-1] == 1.0
        assert values[0] == pytest.approx(low)


def test_stochastic_rounding_keeps_what_nearest_loses() -> None:
    """Momentum of a gradient that is 1/2000 of it: nearest stands still, stochastic follows."""
    means = {}
    for kind in ("bfloat16", "stochastic"):
        (p,) = params = [nn.Parameter(torch.zeros(64, 64))]
        opt = optim.Muon(params, momentum=0.999, **KINDS[kind])
        p.grad = torch.ones_like(p)
        opt.step()
        opt.state[p]["momentum_buffer"].fill_(1.0)
        p.grad = torch.full_like(p, 0.5)
        for _ in range(200):
            opt.step()
        means[kind] = opt.state[p]["momentum_buffer"].float().mean().item()
    exact = 0.5 + 0.5 * 0.999**200
    assert means["bfloat16"] == 1.0 and abs(means["stochastic"] - exact) < 0.01


@EACH
def test_conda_with_half_weights(kind: str) -> None:
    """Its bases are in float32, beside weights of 16 bits and state that is opened in float32."""
    params = make(torch.bfloat16, SHAPES)
    opt = optim.Conda(params, update_proj_gap=2, **KINDS[kind])
    run(opt, params, range(4))
    assert all(p.isfinite().all() for p in params)
    assert all(opt.state[p]["basis"].dtype == torch.float32 for p in params)


def test_scales_are_found_by_their_names() -> None:
    """Whatever the order of the keys in a saved state; codes that were cast are refused."""
    params = make(torch.float32, [(48, 8)])
    groups = [{"params": params, "split": (5, 3) * 6}]  # scales .0 to .11
    a = optim.Muon(groups, state_dtype="8bit")
    run(a, params, range(1))
    saved = a.state_dict()
    found = []
    for order in (list, sorted):
        b = optim.Muon([dict(groups[0])])
        state = {i: {k: s[k] for k in order(s)} for i, s in saved["state"].items()}
        b.load_state_dict({**saved, "state": state})
        found += [b.state[params[0]]["momentum_buffer"]]
    assert torch.equal(*found)
    c = optim.Muon([dict(groups[0])], state_dtype="8bit")
    c.register_load_state_dict_pre_hook(lambda opt, given: copy.deepcopy(saved))
    with pytest.raises(ValueError, match="beside its scales must be uint8"):
        c.load_state_dict(saved)


def test_nan_stays_in_its_matrix() -> None:
    x = torch.randn(3, 5, 7)
    _, scales, clean = coded(x, True)
    x[1, 0, 0] = float("nan")
    _, _, found = coded(x, True)
    assert found[1].isnan().all() and torch.equal(found[0], clean[0])
    assert torch.equal(found[2], clean[2]) and scales.shape == (3, 1)


@EACH
def test_one_graph(kind: str) -> None:
    """For six rates in a tensor; through functionalization as many as without small state."""
    counts = {}
    for backend, more in (("eager", KINDS[kind]), ("aot_eager", KINDS[kind]), ("aot_eager", {})):
        torch._dynamo.reset()
        shapes = SHAPES if backend == "eager" else SHAPES[:1]
        params, twins = make(torch.float32, shapes), make(torch.float32, shapes)
        lr = torch.tensor(0.01)
        a, b = optim.Muon(params, lr=lr, **more), optim.Muon(twins, lr=lr, **more)
        run(a, params, range(1))
        run(b, twins, range(1))
        counter = CompileCounterWithBackend(backend)
        step = torch.compile(a.step, fullgraph=True, backend=counter)
        found = []
        for i in range(1, 7):
            set_grads(i, params, twins)
            lr.fill_(0.01 * i)
            step()
            b.step()
            found.append(counter.frame_count)
        assert same(snapshot(a), snapshot(b))
        counts[backend, bool(more)] = found
    assert counts["eager", True] == [1] * 6
    assert counts["aot_eager", True] == counts["aot_eager", False]


@ALL
@EACH
@pytest.mark.parametrize("room", [None, 1500], ids=["whole", "parts"])
def test_a_step_is_float32s_rounded_once(
    row: Row, kind: str, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are to the bit those of a step on the state as it is read; state is what that step
    left, kept as any state is. Also where a work buffer does not hold all matrices."""
    if room:
        monkeypatch.setattr(steps, "WORK", room)
    small, plain, fresh = (make(torch.float32, SHAPES) for _ in range(3))
    a, b, c = (
        build(row, p, **k) for p, k in ((small, KINDS[kind]), (plain, {}), (fresh, KINDS[kind]))
    )
    run(a, small, range(2))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    with torch.no_grad():
        for p, q in zip(small, plain, strict=True):
            q.copy_(p)
    run(a, small, range(2, 3))
    run(b, plain, range(2, 3))
    assert all(torch.equal(p, q) for p, q in zip(small, plain, strict=True))
    if kind == "stochastic":  # one of the two neighbours
        for key, values in elementwise(b).items():
            for x, y in zip(values, elementwise(a)[key], strict=True):
                assert ((x - y.float()).abs() <= 2.0**-7 * x.abs()).all(), key
        return
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    for x, y in zip(a.state.values(), c.state.values(), strict=True):
        assert x.keys() == y.keys()
        for key, t in x.items():
            assert torch.equal(t, y[key]) if isinstance(t, Tensor) else t == y[key], key


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"state_dtype": "int8"}, "state_dtype must be one of"),
     ({"stochastic_rounding": "yes"}, "stochastic_rounding must be one of"),
     ({"state_dtype": "8bit", "mantissa": True}, "None or .float32. with mantissa"),
     ({**KINDS["stochastic"], "capturable": True}, "capturable must be False")],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"Muon: .*{word}"):
        optim.Muon(make(torch.float32, SHAPES), **settings)
