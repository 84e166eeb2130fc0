"""Maps of singular values against the SVD in float64, constraints after steps, network bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from orthonorm import nn as on
from polar_judge import matrix
from torch import Tensor, nn

SHAPES = ((1, 1), (1, 9), (9, 1), (30, 50), (50, 30), (40, 40), (120, 64))
KINDS = ("gaussian", "log 1e-5", "power law", "rank n/2", "condition 1e-12", "clustered", "flat")


def spectral(W: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """U f(S) V^T in float64."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U * f(s).unsqueeze(-2)) @ Vh


def norm(W: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(W.double(), 2)


# ---- maps of all singular values -----------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_hard_cap(shape: tuple[int, int], kind: str) -> None:
    """min(sigma, cap) within 1e-5 of the SVD's in float32, relative to sigma_1 above 1; rank-
    deficient matrices included, whose polar factor is not defined."""
    for size in (0.3, 1.0, 20.0):
        W = matrix(kind, *shape)
        W = (W / norm(W).clamp(min=1e-30) * size).float()
        for cap in (0.05, 0.7, 30.0):
            want = spectral(W, lambda s, c=cap: s.clamp(max=c))
            got = on.hard_cap(W, cap)
            assert got.dtype == W.dtype and got.is_contiguous()
            assert norm(got.double() - want) <= 1e-5 * max(1.0, size), (size, cap)
            if kind not in ("rank n/2", "condition 1e-12"):
                f = lambda s, c=cap: s.clamp(min=0.02, max=c)  # noqa: E731
                U, s, Vh = torch.linalg.svd(W, full_matrices=False)  # float32: O is ill-conditioned
                plain = norm((U * f(s)) @ Vh - spectral(W, f))
                off = norm(on.spectral_clip(W, 0.02, cap) - spectral(W, f))
                assert off <= max(2 * plain, 1e-5 * max(1.0, size))


def test_hard_cap_in_other_types() -> None:
    W = matrix("gaussian", 3 * 8, 20).view(3, 8, 20)
    want = torch.stack([spectral(w, lambda s: s.clamp(max=2.0)) for w in W])
    assert (on.hard_cap(W, 2.0) - want).norm() <= 1e-12 * want.norm()
    half = W.bfloat16()
    got = on.hard_cap(half, 2.0)
    exact = torch.stack([spectral(w, lambda s: s.clamp(max=2.0)) for w in half])
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() <= 2 * (exact.bfloat16().double() - exact).norm()
    again = torch.stack([on.hard_cap(w, 2.0) for w in W.float()])
    assert (on.hard_cap(W.float(), 2.0) - again).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polynomial_hard_cap(shape: tuple[int, int]) -> None:
    """The stated error of min(sigma, cap) up to 3.4 caps; beyond, divided down to them."""
    W = matrix("log 1e-2", *shape)
    W = W / norm(W)
    for size in (0.5, 2.0, 3.0):
        got = on.hard_cap(W * size, 1.0, "polynomial")
        off = norm(got - spectral(W * size, lambda s: s.clamp(max=1.0)))
        assert off <= 0.034 and norm(got) <= 1.011
    for size in (5.0, 1e4):
        assert 0.96 <= norm(on.hard_cap(W * size, 1.0, "polynomial")) <= 1.011
    scaled = on.hard_cap(W * 2e3, 1e3, "polynomial")
    torch.testing.assert_close(scaled, on.hard_cap(W * 2, 1.0, "polynomial") * 1e3)


def test_soft_cap_and_its_strength() -> None:
    W = matrix("log 1e-2", 20, 30)
    for cap, update, decay in ((1.0, 0.1, 0.0), (2.0, 0.5, 0.05), (0.3, 0.09, 0.0)):
        a = on.soft_cap_strength(cap, update, decay)
        k = cap * (1 - decay) + update
        x = k - a * k**3
        assert abs(x + a * x**3 - cap) <= 1e-12
        X = W / norm(W) * k
        f = lambda s, a=a: (s - a * s**3) + a * (s - a * s**3) ** 3  # noqa: E731
        torch.testing.assert_close(on.soft_cap(X, a), spectral(X, f))
        assert abs(norm(on.soft_cap(X, a)) - cap) <= 1e-10
    assert abs(on.soft_cap_strength(1.0, 0.1) - 0.158864) <= 1e-6  # ALGORITHMS' figure
    assert on.soft_cap_strength(1.0, 0.1, 0.1) == 0.0


def test_stiefel() -> None:
    W = matrix("gaussian", 12, 30)
    s = torch.linalg.svdvals(on.stiefel(W, 2.0))
    assert s.min() >= 1.9 and s.max() <= 2.1
    want = spectral(W, lambda s: torch.full_like(s, 0.5))
    torch.testing.assert_close(on.stiefel(W, 0.5, "exact"), want)


# ---- maps of the largest singular value ----------------------------------------------------------
@pytest.mark.parametrize("shape", [(9, 1), (30, 50), (50, 30)], ids=str)
def test_largest_singular_value(shape: tuple[int, int]) -> None:
    W = matrix("power law", *shape) * 3

    def first(s: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([value(s[:1]), s[1:]])

    steps = {"steps": 40}
    for cap in (2.0, 5.0):
        normal = on.spectral_normalize(W, cap, **steps)
        torch.testing.assert_close(normal, W / max(1.0, 3 / cap))
        want = spectral(W, lambda s, c=cap: first(s, lambda x: torch.full_like(x, c)))
        torch.testing.assert_close(on.spectral_hammer(W, cap, **steps), want)
    want = spectral(W, lambda s: first(s, lambda x: 0.9 * x))
    torch.testing.assert_close(on.spectral_decay(W, 0.1, **steps), want)
    batch = torch.stack([W, W / 10])
    got = on.spectral_normalize(batch.float(), 1.0)
    assert got.dtype == torch.float32 and torch.equal(got[1], batch[1].float())


def test_clipped_decay_settles_where_it_says() -> None:
    eta, rate, cap = 0.1, 0.2, 1.0
    O = on.stiefel(matrix("gaussian", 6, 9), 1.0, "exact")  # noqa: E741
    W = torch.zeros_like(O)
    for _ in range(60):
        after = W + eta * O
        W = on.clipped_decay(after, rate, cap)
    assert abs(norm(after) - (cap + eta / rate)) <= 1e-5
    assert abs(norm(W) - (cap + (1 - rate) * eta / rate)) <= 1e-5
    small = W / norm(W) * 0.5
    torch.testing.assert_close(on.clipped_decay(small, rate, cap), small)


def test_embed_cap() -> None:
    E = (
        torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-2, 2, 7)[:, None]
    )
    rms = E.double().square().mean(-1, keepdim=True).sqrt()
    for f in (1.0, 4.0):
        torch.testing.assert_close(
            on.embed_cap(E, f).double(), E / rms.clamp(min=1 / f), rtol=1e-6, atol=1e-7
        )


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": on.spectral_normalize, "hammer": on.spectral_hammer, "decay": on.spectral_decay,
    "soft": lambda W: on.soft_cap(W, 0.1), "hard": on.hard_cap,
    "polynomial": lambda W: on.hard_cap(W, 1.0, "polynomial"),
    "clip": lambda W: on.spectral_clip(W, 0.0, 1.0), "clipped": lambda W: on.clipped_decay(W, 0.1),
    "stiefel": on.stiefel, "exact": lambda W: on.stiefel(W, 1.0, "exact"), "embed": on.embed_cap,
}  # fmt: skip


@pytest.mark.parametrize("f", MAPS.values(), ids=MAPS)
def test_special_matrices(f: Callable[[Tensor], Tensor]) -> None:
    """Zero stays zero, NaN stays in its matrix, the input is not written, nothing is recorded."""
    W = matrix("gaussian", 3 * 6, 8).view(3, 6, 8).float() * 0.3
    W[1] = 0
    W[2, 0, 0] = math.nan
    before = W.clone()
    got = f(W.requires_grad_())
    assert not got.requires_grad and got.shape == W.shape and got.dtype == W.dtype
    assert got[0].isfinite().all() and not got[1].any() and got[2].isnan().any()
    assert torch.equal(W.detach().nan_to_num(), before.nan_to_num())


def test_bad_arguments() -> None:
    W = torch.randn(3, 4)
    for f, message in (
        (lambda: on.hard_cap(W, 0.0), "hard_cap: cap must be above 0"),
        (lambda: on.hard_cap(W, 1.0, "svd"), "method must be one of"),
        (lambda: on.hard_cap(W[0]), "at least 2 dimensions"),
        (lambda: on.spectral_clip(W, 2.0, 1.0), r"high must be in \[2, "),
        (lambda: on.spectral_decay(W, 1.5), "rate must be in"),
        (lambda: on.soft_cap(W, -1.0), "strength must be in"),
        (lambda: on.soft_cap_strength(-1.0, 0.1), "cap must be above 0"),
        (lambda: on.spectral_normalize(W, 1.0, 0), "steps must be at least 1"),
        (lambda: on.embed_cap(W, 0.0), "inflation must be above 0"),
        (lambda: on.spectral_init_(W, kind="sparse"), "kind must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            f()


@pytest.mark.parametrize(
    "name",
    ["spectral_normalize", "spectral_hammer", "spectral_decay", "hard_cap", "spectral_clip",
     "clipped_decay", "soft_cap", "stiefel", "embed_cap"],
)  # fmt: skip
def test_messages_name_the_function_that_was_called(name: str) -> None:
    bounds = (0.0, 1.0) if name == "spectral_clip" else (0.5,)
    with pytest.raises(ValueError, match=f"^{name}: . must have at least 2 dimensions"):
        getattr(on, name)(torch.ones(3), *bounds)
    if name in ("spectral_normalize", "spectral_hammer", "spectral_decay"):
        with pytest.raises(ValueError, match=f"^{name}: steps must be at least 1, got 0"):
            getattr(on, name)(torch.ones(3, 3), 0.5, 0)
    if name in ("hard_cap", "clipped_decay"):
        rate = (0.5,) if name == "clipped_decay" else ()
        with pytest.raises(ValueError, match=f"^{name}: cap must be above 0, got -1"):
            getattr(on, name)(torch.ones(3, 3), *rate, cap=-1.0)
        with pytest.raises(ValueError, match=f"^{name}: W must have at least 2 dimensions"):
            getattr(on, name)(torch.ones(3), *rate, method="polynomial")


# ---- constraints and initialization --------------------------------------------------------------
def test_after_step_of_any_optimizer() -> None:
    """SGD and AdamW keep norms at the cap, in units of the spectral condition where asked."""
    torch.manual_seed(0)
    for make in (torch.optim.SGD, torch.optim.AdamW):
        model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(96, 4))
        weights = [model[0].weight, model[2].weight]
        optimizer = make(model.parameters(), lr=0.1)
        handle = on.after_step(optimizer, functools.partial(on.hard_cap, cap=0.5), weights, True)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 1, 6, 6)).square().sum().backward()
            optimizer.step()
        for W in weights:
            assert norm(W.detach().flatten(1)) <= 0.5 * on.spectral_scale(W) * (1 + 1e-5)
            assert W.requires_grad and W.is_leaf
        handle.remove()
        optimizer.step()
        assert norm(weights[1].detach()) > 0.51 * on.spectral_scale(weights[1])


def test_constrain_refuses_other_shapes() -> None:
    W = torch.randn(3, 4)
    before = W.clone()
    with pytest.raises(ValueError, match=r"f\(W\) must have shape \(3, 4\), got \(4, 3\)"):
        on.constrain_([W], lambda A: A.mT)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        on.constrain_([torch.zeros(3)], on.hard_cap)
    assert torch.equal(W, before)


@pytest.mark.parametrize("kind", ["normal", "orthogonal"])
def test_spectral_init(kind: str) -> None:
    torch.manual_seed(0)
    for shape in ((40, 10), (10, 40), (8, 3, 3, 3)):
        W = torch.empty(shape)
        assert on.spectral_init_(W, 2.0, kind) is W
        want = 2.0 * math.sqrt(shape[0] / math.prod(shape[1:]))
        assert abs(norm(W.flatten(1)) / want - 1) <= (1e-2 if kind == "normal" else 1e-5)


# ---- a network's bound ---------------------------------------------------------------------------
def test_lipschitz_report() -> None:
    """The bound holds for the network's Jacobian, and is the product of its rows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(),
        nn.Sequential(nn.Linear(64, 8), nn.LeakyReLU(2.0), nn.Dropout(), nn.Linear(8, 3)),
    ).double()  # fmt: skip
    on.spectral_norm_(model[4])
    model(torch.randn(9, 1, 4, 4, dtype=torch.float64))
    report = on.lipschitz_report(model)
    assert model.training and model[4][0].training
    assert [path for path, *_ in report.rows] == ["0", "1", "2", "3", "4.0", "4.1", "4.2", "4.3"]
    assert math.isclose(report.bound, math.prod(v for *_, v in report.rows))
    text = str(report)
    assert "LeakyReLU" in text and "product" in text and len(text.splitlines()) == 9
    model.eval()
    for seed in range(20):
        x = torch.randn(
            1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        J = torch.autograd.functional.jacobian(model, x * 3).view(3, 16)
        assert norm(J) <= report.bound
    slope = torch.autograd.functional.jacobian(
        lambda x: nn.GELU()(x).sum(), torch.linspace(-3, 3, 999)
    )
    assert slope.max() <= 1.129


def test_lipschitz_report_needs_rules() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    model = nn.Sequential(nn.Linear(4, 4), Residual())
    with pytest.raises(TypeError, match="must have one for Residual at '1'"):
        on.lipschitz_report(model)
    rules = {Residual: lambda m: 1 + on.lipschitz_report(m.f).bound}
    report = on.lipschitz_report(model, rules)
    assert norm(torch.eye(4) + model[1].f.weight) * norm(model[0].weight) <= report.bound


class Skip(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Double(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Sequential):
    """A subclass that keeps the forward of its kind."""


def test_lipschitz_report_asks_a_rule_for_forwards_of_subclasses() -> None:
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: 5 * x  # type: ignore[method-assign]
    for module in (Skip(nn.Linear(4, 4)), Scaled(4, 4), Double(), patched):
        with pytest.raises(TypeError, match=f"rules must have one for {type(module).__name__}"):
            on.lipschitz_report(nn.Sequential(nn.Linear(4, 4), module))
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))  # of a class torch makes
    assert len(on.lipschitz_report(Named(linear, nn.ReLU())).rows) == 2


def test_lipschitz_report_counts_a_shared_layer_each_time() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = 2 * torch.eye(4)
    report = on.lipschitz_report(nn.Sequential(layer, layer))
    assert [path for path, *_ in report.rows] == ["0", "1"]
    assert report.bound >= 4
