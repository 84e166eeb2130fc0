"""Spectral normalization of layers against torch's two versions, the SVD and calculus."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from orthonorm import nn as on
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(20, 12),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "Bilinear": lambda: nn.Bilinear(4, 3, 5),
    "Embedding": lambda: nn.Embedding(9, 5),
}
EACH_LAYER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
ORDERS = pytest.mark.parametrize("order", ["u_first", "v_first"])


def theirs(order: str) -> Callable[..., Any]:
    return parametrizations.spectral_norm if order == "u_first" else nn.utils.spectral_norm


def pair(make: Callable[[], nn.Module], order: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same layer with torch's spectral norm and with ours, from the same random vectors."""
    made = []
    for wrap in (theirs(order), lambda m, **k: on.spectral_norm(m, order=order, **k)):
        torch.manual_seed(0)
        layer = make().double()
        torch.manual_seed(1)
        made.append(wrap(layer, **options))
    return made[0], made[1]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a forward; torch's older hook computes it in one."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, None)
    return layer.weight


def original(layer: nn.Module) -> Tensor:
    plain = dict(layer.named_parameters(recurse=True))
    return next(p for n, p in plain.items() if n.endswith(("weight_orig", "weight.original")))


# ---- the same results as torch -------------------------------------------------------------------
@EACH_LAYER
@ORDERS
@pytest.mark.parametrize("steps", [1, 3])
def test_same_as_torch(make: Callable[[], nn.Module], order: str, steps: int) -> None:
    """Weights, vectors and gradients over training and evaluation, in float64."""
    a, b = pair(make, order, n_power_iterations=steps)
    for k in range(4):
        for m in (a, b):
            m.train(k != 2)
        want, got = weight_of(a), weight_of(b)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        G = torch.randn(want.shape, dtype=torch.float64)
        (g,) = torch.autograd.grad(got, original(b), G)
        (h,) = torch.autograd.grad(want, original(a), G)
        torch.testing.assert_close(g, h, rtol=1e-11, atol=1e-12)
    mine, other = b.state_dict(), a.state_dict()
    assert set(mine) == set(other)
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-13)


def test_sigma_in_float32_is_torchs_to_1e_6() -> None:
    for n in (32, 100, 300):
        a, b = (wrap(nn.Linear(n, n)) for wrap in (theirs("u_first"), on.spectral_norm))
        b.load_state_dict(a.state_dict())
        for _ in range(3):
            ratio = (b.weight / a.weight).nanmedian()
            assert abs(ratio - 1) <= 1e-6


@ORDERS
def test_converges_to_the_spectral_norm(order: str) -> None:
    torch.manual_seed(0)
    m = on.spectral_norm(nn.Conv2d(5, 7, 3).double(), order=order)
    for _ in range(500):
        weight = m.weight
    assert abs(torch.linalg.matrix_norm(weight.flatten(1), 2) - 1) <= 1e-10


def test_vectors_are_divided_by_their_norm() -> None:
    m = on.spectral_norm(nn.BatchNorm1d(7).double())
    n = parametrizations.spectral_norm(nn.BatchNorm1d(7).double())
    assert torch.equal(m.weight, n.weight)


# ---- state dicts ---------------------------------------------------------------------------------
@ORDERS
@pytest.mark.parametrize("own", ["u_first", "v_first"])
def test_state_dicts_of_both_versions_load(order: str, own: str) -> None:
    """Torch's into ours, whatever its names; ours into torch's of the same order."""
    a, _ = pair(LAYERS["ConvTranspose2d"], order)
    weight_of(a)
    b = on.spectral_norm(LAYERS["ConvTranspose2d"]().double(), order=own)
    b.load_state_dict(a.state_dict())
    a.eval(), b.eval()
    torch.testing.assert_close(b.weight, weight_of(a), rtol=1e-12, atol=0)
    c = theirs(own)(LAYERS["ConvTranspose2d"]().double())
    c.load_state_dict(b.state_dict())
    c.eval()
    torch.testing.assert_close(b.weight, weight_of(c), rtol=1e-12, atol=0)


def test_oldest_state_dicts_load() -> None:
    """Of the hook before it kept v: weight, weight_orig and weight_u."""
    a, b = pair(LAYERS["Linear"], "v_first")
    for _ in range(3):
        weight_of(a)
    state = a.state_dict()
    old = {k: v for k, v in state.items() if k != "weight_v"}
    old["weight"] = a.weight.detach().clone()
    b.load_state_dict(old)
    b.eval()
    torch.testing.assert_close(b.weight, a.weight, rtol=1e-10, atol=0)


# ---- all layers of a model at once ---------------------------------------------------------------
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.Flatten(),
        nn.Linear(4 * 64, 10), nn.Tanh(), nn.Linear(10, 3),
    ).double()  # fmt: skip


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]


def twins(order: str = "u_first") -> tuple[nn.Module, nn.Module]:
    a, b = net(), net()
    for m in layers_of(a):
        on.spectral_norm(m, order=order)
    on.spectral_norm_(b, order=order)
    b.load_state_dict(a.state_dict())
    return a, b


def inputs(seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 8, 8, generator=g, dtype=torch.float64)


@ORDERS
def test_together_is_one_by_one(order: str) -> None:
    """Outputs, buffers and gradients, with two forwards before one backward."""
    a, b = twins(order)
    for step in range(3):
        for m in (a, b):
            m.zero_grad()
            m.train(step != 1)
            (m(inputs()) - m(inputs(4)).square()).sum().backward()
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12, msg=name)
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-13, msg=name)


def test_one_call_of_the_op_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthonorm.nn import normalized

    _, b = twins()
    calls = []
    op = normalized.power_iteration_
    real = op.overload
    monkeypatch.setattr(op, "overload", lambda W, *a: calls.append(len(W)) or real(W, *a))
    b(inputs())
    assert calls == [4]
    b[0](inputs())  # a layer without its model
    assert calls == [4, 1]
    b[6].eval()
    b(inputs())
    assert sorted(calls[2:]) == [1, 3]


def test_unused_layers_get_no_gradient() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    m = on.spectral_norm_(Half())
    m(torch.randn(2, 4)).sum().backward()
    assert original(m.used).grad is not None and original(m.idle).grad is None


def test_a_failed_forward_leaves_nothing_behind() -> None:
    _, b = twins()
    with pytest.raises(RuntimeError):
        b(torch.zeros(2, 5, 8, 8, dtype=torch.float64))
    before = b.state_dict()[next(k for k in b.state_dict() if k.endswith("_u"))].clone()
    weight = b[0].weight  # computed anew, with a step of its own
    assert weight.requires_grad and not any(p.ready for _, _, _, p in found(b))
    assert not torch.equal(before, found(b)[0][3]._u)


def found(model: nn.Module) -> list[Any]:
    from orthonorm.nn.spectral_norm import spectral_norms

    return list(spectral_norms(model))


def test_chosen_layers() -> None:
    m = net()
    on.spectral_norm_(m, layers=[m[0], m[6]])
    assert [path for path, *_ in found(m)] == ["0", "6"]
    with pytest.raises(ValueError, match="in the model"):
        on.spectral_norm_(net(), layers=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="no layers"):
        on.spectral_norm_(nn.Sequential(nn.ReLU()))


def test_gradients_are_those_of_autograd() -> None:
    """First and second, of W / (u^T W v) with u and v constant."""
    m = on.spectral_norm(nn.ConvTranspose1d(3, 4, 2).double()).eval()
    p, W = found(m)[0][3], original(m).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(p, (W,))
    assert torch.autograd.gradgradcheck(p, (W,))


def test_gradient_penalty_trains() -> None:
    """A double backward through the layers, as WGAN-GP takes it, equals torch's."""
    grads = []
    a, b = pair(LAYERS["Linear"], "u_first")
    for m in (a, b):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(2, 20).requires_grad_()
        (g,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        (g.norm() - 1).square().backward()
        grads.append(original(m).grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_keep_float_vectors(dtype: torch.dtype) -> None:
    """As FSDP's mixed precision has it: off by at most twice the rounding of the result."""
    torch.manual_seed(0)
    m = on.spectral_norm(nn.Linear(40, 30, bias=False).to(dtype))
    W = original(m).detach()
    p = found(m)[0][3]
    assert p._u.dtype == torch.float32
    got = m.weight
    want = W.double() / (p._u.double() @ W.double() @ p._v.double())
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= 2 * (want.to(dtype).double() - want).norm()
    G = torch.randn(30, 40).to(dtype)
    (g,) = torch.autograd.grad(got, original(m), G)
    assert g.dtype == dtype and g.isfinite().all()


# ---- compile, copies, removal --------------------------------------------------------------------
def test_compiled_is_eager() -> None:
    """One graph, with the buffers updated in it."""
    _, b = twins()
    c = copy.deepcopy(b)
    compiled = torch.compile(c, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        want, got = b(inputs()), compiled(inputs())
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        want.sum().backward(), got.sum().backward()
    for p, q in zip(b.parameters(), c.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)
    for x, y in zip(b.buffers(), c.buffers(), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-11, atol=1e-12)


def test_deep_copies_are_independent() -> None:
    _, b = twins()
    c = copy.deepcopy(b)
    before = [x.clone() for x in b.buffers()]
    c(inputs())
    assert all(torch.equal(x, y) for x, y in zip(before, b.buffers(), strict=True))
    on.remove_spectral_norm(c)
    b(inputs())
    assert found(b) and not found(c)


def test_average_with_refreshed_vectors() -> None:
    """An EMA of weights and buffers: u and v are averages until they are refreshed."""
    _, b = twins()
    ema = torch.optim.swa_utils.AveragedModel(
        b, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    for _ in range(3):
        with torch.no_grad():
            for p in b.parameters():
                p.copy_(torch.randn_like(p))
        b(inputs())
        ema.update_parameters(b)
    on.refresh_vectors_(ema.module, 500)
    ema.eval()
    for _, m, name, _ in found(ema.module):
        matrix = getattr(m, name)
        matrix = matrix.movedim(int(isinstance(m, nn.ConvTranspose2d)), 0).flatten(1)
        assert abs(torch.linalg.matrix_norm(matrix, 2) - 1) <= 1e-6


def test_removal_leaves_the_weight_of_evaluation() -> None:
    for order in ("u_first", "v_first"):
        _, b = twins(order)
        b(inputs())
        b.eval()
        want = b(inputs())
        b.train()
        assert on.remove_spectral_norm(b) is b
        assert sorted(b.state_dict()) == sorted(net().state_dict())
        torch.testing.assert_close(b(inputs()), want, rtol=1e-13, atol=1e-13)
        assert not b._forward_pre_hooks and not b._forward_hooks
        assert not b[0]._load_state_dict_pre_hooks and not b[0]._state_dict_hooks
        with pytest.raises(ValueError, match="no spectral norm"):
            on.remove_spectral_norm(b)
        on.spectral_norm_(b)


def test_one_layer_of_a_group_may_go() -> None:
    _, b = twins()
    parametrize.remove_parametrizations(b[4], "weight")
    b(inputs()).sum().backward()
    assert b[4].weight.grad is not None and len(found(b)) == 3


def test_survives_sgd() -> None:
    """Parameters keep their identity, so an optimizer made before sees them."""
    b = net()
    before = {id(p) for p in b.parameters()}
    on.spectral_norm_(b)
    assert {id(p) for p in b.parameters()} == before
    optimizer = torch.optim.SGD(b.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        b(inputs()).square().sum().backward()
        optimizer.step()
    assert b(inputs()).isfinite().all()


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("together", [False, True])
def test_zero_and_nan_weights(together: bool) -> None:
    m = nn.Sequential(nn.Linear(6, 5))
    on.spectral_norm_(m) if together else on.spectral_norm(m[0])
    with torch.no_grad():
        original(m[0]).zero_()
    y = m(torch.randn(3, 6))
    y.sum().backward()
    assert not m[0].weight.any() and original(m[0]).grad.any()
    vectors = [x.clone() for x in m.buffers()]
    assert all(abs(x.norm() - 1) <= 1e-6 for x in vectors)
    with torch.no_grad():
        original(m[0])[0, 0] = math.nan
    assert m(torch.randn(3, 6)).isnan().any()
    assert all(torch.equal(x, y) for x, y in zip(vectors, m.buffers(), strict=True))


@pytest.mark.parametrize("first", ["ours", "u_first", "v_first", "group"])
def test_double_registration(first: str) -> None:
    m = nn.Sequential(nn.Linear(3, 4))
    wrap = {"ours": on.spectral_norm, "group": None}.get(first, first)
    if first == "group":
        on.spectral_norm_(m)
    else:
        (wrap if callable(wrap) else theirs(first))(m[0])
    keys = list(m.state_dict())
    for again in (lambda: on.spectral_norm(m[0]), lambda: on.spectral_norm_(m)):
        with pytest.raises(ValueError, match="spectral norm already"):
            again()
    with pytest.raises(ValueError, match="spectral norm already"):
        on.sigma_reparam(m[0])
    assert list(m.state_dict()) == keys


def test_bad_arguments_change_nothing() -> None:
    m = nn.Linear(3, 4)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "n_power_iterations must be at least 1", {"n_power_iterations": 0}),
        (TypeError, "n_power_iterations must be an integer", {"n_power_iterations": 1.5}),
        (ValueError, "eps must be in", {"eps": -1.0}),
        (ValueError, "order must be one of", {"order": "both"}),
        (ValueError, r"dim must be in \[-2, 1\], got 2", {"dim": 2}),
        (ValueError, "no parameter or buffer 'gain'", {"name": "gain"}),
        (TypeError, "must be a convolution, got Linear", {"size": (8,)}),
    ]
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            on.spectral_norm(m, **options)
        assert list(m.state_dict()) == ["weight", "bias"]
    with pytest.raises(ValueError, match="must be initialized"):
        on.spectral_norm(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="no parameter or buffer"):
        on.spectral_norm(nn.ReLU())
    integers = nn.Module()
    integers.register_buffer("weight", torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match="float32"):
        on.spectral_norm(integers)


def test_changed_shapes_are_refused() -> None:
    m = on.spectral_norm(nn.Linear(3, 4))
    with torch.no_grad():
        original(m).set_(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"must keep shape \(4, 3\), got \(5, 3\)"):
        m(torch.randn(2, 3))
