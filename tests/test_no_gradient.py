"""What has no gradient says so at backward, and costs nothing until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orthonorm
import pytest
import torch
from orthonorm import OPS, ops
from orthonorm.bench.cases import CASES, Case
from orthonorm.bench.inputs import Inputs, copied, map_tensors
from orthonorm.compat import gram_newton_schulz, muon
from test_ops import made
from torch import Tensor

SAYS = r"{}: has no gradient; .*detach.*torch\.no_grad.*spectral_norm.*gram_iteration.*nn"
QUINTIC = [(1.5, -0.5, 0.0)] * 3
PUBLIC: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "polar": ("polar", orthonorm.polar),
    "polar of a list": ("polar", lambda X: orthonorm.polar([X, X.detach()])[0]),
    "polar, exact": ("polar_exact", lambda X: orthonorm.polar(X, precision="exact")),
    "polar_exact": ("polar_exact", lambda X: orthonorm.polar_exact(X).factor),
    "its orthogonality": ("polar_exact", lambda X: orthonorm.polar_exact(X).orthogonality),
    "odd_polynomial": ("odd_polynomial", lambda X: orthonorm.odd_polynomial(X, QUINTIC)),
    "compat.muon": ("newton_schulz", lambda X: muon.zeropower_via_newtonschulz5(X, 5)),
    "compat.gram_newton_schulz": ("newton_schulz", gram_newton_schulz.GramNewtonSchulz()),
}


def raises_at_backward(name: str, f: Callable[[Tensor], Tensor], X: Tensor) -> None:
    out = f(X)
    assert out.requires_grad
    with pytest.raises(NotImplementedError, match=SAYS.format(name)):
        (2 * out).square().sum().backward()
    assert X.grad is None


@pytest.mark.parametrize("case", PUBLIC)
def test_public_functions(case: str) -> None:
    name, f = PUBLIC[case]
    for shape in ((5, 9), (160, 150)):
        raises_at_backward(name, f, torch.randn(shape, requires_grad=True))


FUNCTIONAL = [c for c in CASES.values() if not c.op.schema.endswith("-> ()")]


@pytest.mark.parametrize("case", FUNCTIONAL, ids=lambda c: c.name)
def test_ops(case: Case) -> None:
    """Each op that returns something, for each argument that could want a gradient."""
    good = made(case, ((5, 9), (2, 7, 4)), Inputs())
    names = [k for k, v in good.items() if k not in case.mutated and tensors_of(v)]
    for name in names:
        arguments = copied(good)
        arguments[name] = map_tensors({name: arguments[name]}, lambda t: t.requires_grad_())[name]
        out = [t for t in tensors_of(case.op(**arguments)) if t.is_floating_point()]
        if not case.op.has_gradient:
            assert all(t.requires_grad for t in out)
            with pytest.raises(NotImplementedError, match=SAYS.format(case.name)):
                torch.cat([t.reshape(-1) for t in out]).sum().backward()


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else []


def test_results_are_those_without_gradients() -> None:
    """Same bits, types and memory of their own, whatever is asked of the parameter."""
    W = torch.nn.Parameter(torch.randn(6, 9))
    plain = W.detach()
    got, want = orthonorm.polar_exact(W), orthonorm.polar_exact(plain)
    assert type(got) is type(want) and all(map(torch.equal, got, want))
    pair = orthonorm.polar([W, plain])
    assert type(pair) is list and torch.equal(pair[0], orthonorm.polar(plain))
    kept = orthonorm.polar(W)
    kept.mul_(2)  # no view of anything
    assert torch.equal(kept, 2 * orthonorm.polar(plain)) and torch.equal(W, plain)
    sigma, u, v = ops.spectral_norm(W, 30)
    (grad,) = torch.autograd.grad(sigma, W)
    torch.testing.assert_close(grad, u[:, None] * v)


def test_nothing_is_recorded_where_nothing_is_asked() -> None:
    W = torch.nn.Parameter(torch.randn(6, 9))
    assert not orthonorm.polar(W.detach()).requires_grad
    with torch.no_grad():
        assert not orthonorm.polar(W).requires_grad
        assert not orthonorm.polar_exact(W).factor.requires_grad
        assert not OPS["gram"](W).requires_grad
    with torch.inference_mode():
        assert not orthonorm.polar(W).requires_grad


def test_compiled_calls_of_parameters_still_work() -> None:
    W = torch.nn.Parameter(torch.randn(6, 9))
    torch._dynamo.reset()
    for f in (orthonorm.polar, lambda X: orthonorm.odd_polynomial(X, QUINTIC), OPS["gram"]):
        call = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.equal(call(W), f(W))
