"""orthonorm.compat: the originals' formulas, names, parameters and defaults, on these kernels."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from orthonorm.coefficients import COEFFICIENTS
from orthonorm.compat import (
    dion,
    emerging_optimizers,
    gram_newton_schulz,
    modded_nanogpt,
    muon,
    patch_torch_muon,
    torch_muon,
)
from torch import Tensor
from torch.optim import _muon

Triples = tuple[tuple[float, float, float], ...]


def iterate(X: Tensor, triples: Triples) -> Tensor:
    for a, b, c in triples:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


class Original(NamedTuple):
    """A function elsewhere: its formula, signature and source."""

    ours: Callable[..., Tensor]
    triples: Triples
    divisor: Callable[[Tensor], Tensor]  # of the Frobenius norm
    signature: str
    dtype: torch.dtype = torch.bfloat16
    arguments: dict[str, Any] = {}  # noqa: RUF012

    def formula(self, G: Tensor, dtype: torch.dtype) -> Tensor:
        X = G.to(self.dtype).to(dtype)
        wide = X if X.shape[-2] <= X.shape[-1] else X.mT
        Y = iterate(wide / self.divisor(wide.norm(dim=(-2, -1), keepdim=True)), self.triples)
        return Y if wide is X else Y.mT


def sets(name: str, steps: int) -> Triples:
    return COEFFICIENTS[name].steps(steps)


EPS = "(G, epsilon=1e-07)"
EO = (
    "(x, steps, coefficient_type='quintic', custom_coefficient_sets=None, eps=1e-07, "
    "transpose=None, tp_group=None, use_syrk=False)"
)
GNS = gram_newton_schulz.GramNewtonSchulz
ORIGINALS = {
    "keller": Original(
        muon.zeropower_via_newtonschulz5, sets("keller", 5), lambda n: n + 1e-7, "(G, steps)",
        arguments=dict(steps=5),
    ),
    "modded": Original(
        modded_nanogpt.polar_express, sets("polar_express_1.02", 5), lambda n: 1.02 * n + 1e-6,
        "(G, split_baddbmm=False)",
    ),
    "dion": Original(dion.newton_schulz_triton, sets("you5", 5), lambda n: n + 1e-7, EPS),
    "dion torch": Original(
        dion.zeropower_via_newtonschulz5, sets("you5", 5), lambda n: n + 1e-7, EPS
    ),
    "dion polar": Original(
        dion.polar_express, sets("polar_express_1.02", 5), lambda n: 1.02 * n + 1e-6,
        "(G, epsilon=1e-06)",
    ),
    "nvidia": Original(
        emerging_optimizers.newton_schulz, sets("you5", 5) * 2, lambda n: n.clamp(min=1e-7), EO,
        torch.float32, dict(steps=10),
    ),
    "nvidia polar": Original(
        emerging_optimizers.newton_schulz, sets("polar_express_nvidia", 9), lambda n: n, EO,
        torch.float32, dict(steps=9, coefficient_type="polar_express"),
    ),
    "nvidia custom": Original(
        emerging_optimizers.newton_schulz, sets("keller", 1) + ((1.5, -0.5, 0.0),), lambda n: n, EO,
        torch.float32, dict(steps=2, coefficient_type="custom",
                            custom_coefficient_sets=[(3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0)]),
    ),
    "gram": Original(
        GNS(ns_use_kernels=False), sets("polar_express", 5), lambda n: n + 1e-7, "(X)",
        torch.float32,
    ),
    "gram off": Original(
        GNS(ns_coefficients=gram_newton_schulz.YOU_COEFFICIENTS, use_gram_newton_schulz=False),
        sets("you5", 5), lambda n: n + 1e-7, "(X)", torch.float32,
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("original", ORIGINALS.values(), ids=list(ORIGINALS))


@EACH
@pytest.mark.parametrize("scale", [1.0, 1e-7])  # where what is added to the norm matters too
def test_formula(original: Original, scale: float) -> None:
    for shape in ((13, 29), (70, 41), (2, 3, 20, 33), (150, 200)):
        if original.signature is EO and len(shape) > 3:
            continue
        G = torch.randn(shape) * scale
        kept = G.clone()
        got = original.ours(G, **original.arguments)
        exact = original.formula(G, torch.float64)
        theirs = original.formula(G, original.dtype).double()
        assert got.dtype == original.dtype and got.shape == G.shape and torch.equal(G, kept)
        error, allowed = (got.double() - exact).norm(), (theirs - exact).norm()
        assert error <= 2 * allowed


@EACH
def test_signature(original: Original) -> None:
    """Parameters of the original, in order, with its defaults; more may follow."""
    takes(original.ours, original.signature)


def takes(ours: Any, signature: str) -> None:
    wanted = inspect.signature(eval(f"lambda {signature[1:-1]}: None")).parameters.values()
    mine = list(inspect.signature(ours).parameters.values())
    for a, b in zip(wanted, mine, strict=False):
        assert a.name == b.name
        assert a.default in (inspect.Parameter.empty, b.default)
    assert len(mine) >= len(wanted)


def test_rows_scaled_before_the_iteration() -> None:
    """dion's fast function: AOL, whose clamp is of the square."""
    G = torch.randn(40, 70)
    for eps in (1e-7, torch.tensor(5e3)):
        exact, theirs = (
            iterate(X * (X @ X.mT).abs().sum(-1, keepdim=True).clamp(min=eps).rsqrt(),
                    sets("aol", 4)).double()
            for X in (G.bfloat16().double(), G.bfloat16())
        )  # fmt: skip
        got = dion.newton_schulz_triton_fast(G, eps)
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() <= 2 * (theirs - exact).norm()


def test_epsilon_may_be_a_tensor() -> None:
    G = torch.randn(30, 20) * 1e-6
    a, b = (
        dion.newton_schulz_triton(G, epsilon=e)
        for e in (1e-5, torch.tensor(1e-5, dtype=torch.float64))
    )
    assert torch.equal(a, b)


def test_medium_precision_follows_torch() -> None:
    """What torch.set_float32_matmul_precision says of float32."""
    G = torch.randn(150, 200)
    full = emerging_optimizers.newton_schulz(G, 5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        medium = emerging_optimizers.newton_schulz(G, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert medium.dtype == torch.float32
    exact = ORIGINALS["nvidia"]._replace(triples=sets("you5", 5))
    bound = (exact.formula(G, torch.bfloat16).double() - exact.formula(G, torch.float64)).norm()
    assert (medium.double() - full.double()).norm() <= 2 * bound


def test_bad_arguments_are_refused() -> None:
    G = torch.randn(4, 4)
    ns = emerging_optimizers.newton_schulz
    for call, message in (
        (lambda: ns(G, 4, "aol"), "reverses singular directions"),
        (lambda: ns(G, 5, "quintc"), "coefficient_type must be one of .*'quintc'"),
        (lambda: ns(G, 5, "custom"), "custom_coefficient_sets must be given"),
        (lambda: ns(G, 5, tp_group=object()), "transpose must be"),
        (lambda: emerging_optimizers.newton_schulz_tp(G, 5, "simple", None, 2), "partition_dim"),
        (lambda: emerging_optimizers.get_muon_scale_factor(3, 4, "rms"), "mode must be one of"),
        (lambda: muon.MuonWithAuxAdam([dict(params=[G])]), "use_muon"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="float32"):
        ns(G.double(), 5)


def test_scale_factors() -> None:
    f = emerging_optimizers.get_muon_scale_factor
    assert f(8, 2, "shape_scaling") == 2 and f(2, 8, "shape_scaling") == 1
    assert f(2, 16) == 4 and f(2, 8, "unit_rms_norm") == 0.5


# ---- KellerJordan/Muon's optimizers --------------------------------------------------------------
SHAPES = ((12, 8), (8, 20), (6, 5, 3, 2), (10,), (7, 3))


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES
    ]


def groups(params: list[Any]) -> list[dict[str, Any]]:
    return [
        dict(params=params[3:], use_muon=False, lr=0.01, betas=(0.8, 0.95)),
        dict(params=params[:3], use_muon=True, lr=0.05, weight_decay=0.1, momentum=0.9),
    ]


def keller_step(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """muon.py's update of one parameter, in the dtype of p."""
    lr, wd = group["lr"], group.get("weight_decay", 0.0)
    if not group["use_muon"]:
        t = state["step"] = state.get("step", 0) + 1
        m = state["exp_avg"] = state.get("exp_avg", 0 * p).lerp(g, 1 - group["betas"][0])
        v = state["exp_avg_sq"] = state.get("exp_avg_sq", 0 * p).lerp(g**2, 1 - group["betas"][1])
        a, b = m / (1 - group["betas"][0] ** t), v / (1 - group["betas"][1] ** t)
        p.mul_(1 - lr * wd).sub_(lr * a / (b.sqrt() + 1e-10))
        return
    B = state["momentum_buffer"] = state.get("momentum_buffer", 0 * p).lerp(
        g, 1 - group["momentum"]
    )
    U = g.lerp(B, group["momentum"]).flatten(1)
    U = U if U.shape[0] <= U.shape[1] else U.mT
    factor = iterate(U / (U.norm() + 1e-7), sets("keller", 5))
    factor = factor if len(factor) == len(p) else factor.mT
    scale = max(1, g.size(-2) / g.size(-1)) ** 0.5
    p.mul_(1 - lr * wd).sub_(lr * scale * factor.reshape(p.shape))


def test_muon_with_aux_adam() -> None:
    """As muon.py steps, convolutions included; its state dict takes over in the middle."""
    ours, theirs = parameters(), parameters()
    optimizer = muon.SingleDeviceMuonWithAuxAdam(groups(ours))
    states: dict[Any, dict[str, Any]] = {p: {} for p in theirs}
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            q.grad = p.grad.clone()
        optimizer.step()
        with torch.no_grad():
            for group in groups(theirs):
                for q in group["params"]:
                    keller_step(q, q.grad, states[q], group)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, atol=1e-7, rtol=0)  # 1e-7 is added, or the least
        if step == 1:
            file = muon.SingleDeviceMuonWithAuxAdam(groups(theirs)).state_dict()
            ids = {q: i for i, q in enumerate([*theirs[3:], *theirs[:3]])}
            keys = ("params", "lr", "weight_decay", "momentum", "betas", "eps", "use_muon")
            file["param_groups"] = [
                {k: v for k, v in g.items() if k in keys} for g in file["param_groups"]
            ]
            file["state"] = copy.deepcopy({ids[q]: s for q, s in states.items()})
            optimizer = muon.MuonWithAuxAdam(groups(ours))
            optimizer.load_state_dict(file)
    assert [g["use_muon"] for g in optimizer.param_groups] == [False, True]
    assert [g["rule"] for g in optimizer.param_groups] == ["adamw", "matrix"]


OPTIMIZER, WITH_ADAM = "(params, lr=0.02, weight_decay=0, momentum=0.95)", "(param_groups)"
KELLERS: dict[str, str] = {
    "muon_update": "(grad, momentum, beta=0.95, ns_steps=5, nesterov=True)",
    "adam_update": "(grad, buf1, buf2, step, betas, eps)",
    "Muon": OPTIMIZER, "SingleDeviceMuon": OPTIMIZER,
    "MuonWithAuxAdam": WITH_ADAM, "SingleDeviceMuonWithAuxAdam": WITH_ADAM,
}  # fmt: skip


def test_names_of_muon_py() -> None:
    """All of them, with parameters in order and their defaults (at commit 00ba60d3)."""
    assert {*KELLERS, "zeropower_via_newtonschulz5"} == set(muon.__all__)
    for name, signature in KELLERS.items():
        takes(getattr(muon, name), signature)


def test_adam_update() -> None:
    p = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    opt = torch.optim.Adam([p], lr=1.0, betas=(0.8, 0.95), eps=1e-10)
    buffers = torch.zeros_like(p.detach()), torch.zeros_like(p.detach())
    for step in (1, 2, 3):
        before, p.grad = p.detach().clone(), torch.randn_like(p)
        opt.step()
        update = muon.adam_update(p.grad, *buffers, step, (0.8, 0.95), 1e-10)
        torch.testing.assert_close(before - update, p.detach())


def test_single_device_muon_and_its_update() -> None:
    p = torch.nn.Parameter(torch.randn(20, 12))
    before = p.detach().clone()
    p.grad = torch.randn(20, 12)
    kept = p.grad.clone()
    update = muon.muon_update(p.grad, buffer := torch.zeros(20, 12))
    assert torch.equal(p.grad, kept)
    torch.testing.assert_close(buffer, 0.05 * kept)
    muon.Muon([p], lr=0.1).step()
    torch.testing.assert_close(before - 0.1 * update.float(), p.detach(), atol=2e-3, rtol=0)
    assert update.dtype == torch.bfloat16
    convolution = torch.randn(6, 5, 3, 2)
    flat = muon.muon_update(convolution, torch.zeros(6, 5, 3, 2))
    assert flat.shape == (6, 30)
    assert float(flat.norm()) == pytest.approx(math.sqrt(1.5 * 6), rel=0.2)


# ---- torch.optim.Muon itself ---------------------------------------------------------------------
def trained(patched: bool, dtype: torch.dtype = torch.float32, **settings: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype))
        for s in ((40, 20), (20, 40), (150, 200))
    ]
    optimizer = torch.optim.Muon(params, **settings)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        if patched:
            with patch_torch_muon():
                optimizer.step()
        else:
            optimizer.step()
    return [p.detach() for p in params] + [optimizer.state[p]["momentum_buffer"] for p in params]


@pytest.mark.parametrize(
    "settings",
    [{}, dict(adjust_lr_fn="match_rms_adamw", lr=torch.tensor(0.02), weight_decay=0.3),
     dict(ns_steps=3, momentum=0.8, ns_coefficients=(2.0, -1.5, 0.5)), dict(nesterov=False)],
)  # fmt: skip
def test_patched_torch_muon_follows_torch(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lr": 0.02, **settings}
    ours, theirs = trained(True, **settings), trained(False, **settings)
    # torch's function is bfloat16 whatever the weights are; here it iterates in float64
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x.double().clone())
    exact = trained(False, torch.float64, **settings)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm() + 1e-5 * z.norm()


def test_patch_is_undone_and_idempotent() -> None:
    original = _muon.muon
    first = patch_torch_muon()
    second = patch_torch_muon()
    assert _muon.muon is torch_muon.muon
    second.undo()
    assert _muon.muon is torch_muon.muon
    first.undo()
    assert _muon.muon is original
    with patch_torch_muon() as outer:
        first.undo()  # done already
        with patch_torch_muon():
            pass
        assert _muon.muon is torch_muon.muon
    assert _muon.muon is original
    outer.undo()
    with pytest.raises(ZeroDivisionError), patch_torch_muon():
        1 / 0  # noqa: B018
    assert _muon.muon is original


def test_patch_keeps_torchs_arguments() -> None:
    """The functional form has the parameters of the installed torch's."""
    theirs = inspect.signature(torch_muon.ORIGINAL).parameters
    ours = inspect.signature(torch_muon.muon).parameters
    assert {n: p.kind for n, p in theirs.items()} == {n: p.kind for n, p in ours.items()}


@pytest.mark.parametrize("version", ["2.9.1", "2.15.0+cpu", "3.0.0a0"])
def test_unknown_torch_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(RuntimeError, match=f"2.10 to 2.14.*got {version[:4]}"):
        patch_torch_muon()
    assert _muon.muon is torch_muon.ORIGINAL


def test_patched_step_is_one_graph() -> None:
    """torch.compile of the step, for every learning rate."""
    from torch._dynamo.testing import CompileCounter

    p = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.Muon([p], lr=torch.tensor(0.1))
    p.grad = torch.randn(6, 4)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    with patch_torch_muon():
        optimizer.step()  # makes the state
        for lr in (0.1, 0.2, 0.3):
            optimizer.param_groups[0]["lr"].fill_(lr)
            step()
    assert counter.frame_count == 1
