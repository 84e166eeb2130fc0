"""Matrix-free iterations against the dense Hessian, eigh, and tensors built from known parts."""

from __future__ import annotations

import math

import pytest
import torch
from orthonorm import monitor
from polar_judge import matrix
from torch import Tensor, nn

DOUBLE = torch.float64


def problem() -> tuple[Tensor, list[Tensor], Tensor]:
    """A loss, its parameters and their dense Hessian."""
    torch.manual_seed(0)
    X, y = torch.randn(30, 5, dtype=DOUBLE), torch.randn(30, 2, dtype=DOUBLE)

    def loss_of(A: Tensor, b: Tensor) -> Tensor:
        return (torch.tanh(X @ A) + b - y).square().mean() + 0.1 * (A**4).sum()

    A, b = torch.randn(5, 2, dtype=DOUBLE), torch.randn(2, dtype=DOUBLE)
    blocks = torch.autograd.functional.hessian(loss_of, (A, b))
    H = torch.cat([torch.cat([blocks[i][j].reshape(p.numel(), -1) for j in (0, 1)], 1)
                   for i, p in ((0, A), (1, b))])  # fmt: skip
    params = [A.requires_grad_(), b.requires_grad_()]
    return loss_of(*params), params, H


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_hessian_product_is_the_dense_one() -> None:
    loss, params, H = problem()
    product = monitor.hessian_product(loss, params)
    for _ in range(2):
        v = [torch.randn_like(p) for p in params]
        torch.testing.assert_close(flat(product(v)), H @ flat(v), rtol=1e-10, atol=1e-12)
    w = torch.ones(3, requires_grad=True)
    assert not monitor.hessian_product(w.sum(), [w])([w.detach()])[0].any()


def test_top_eigenvalues_with_deflation() -> None:
    loss, params, H = problem()
    values, vectors = torch.linalg.eigh(H)
    order = values.abs().argsort(descending=True)
    found = monitor.top_hessian_eigenvalues(loss, params, 3, steps=1000, tol=1e-7)
    torch.testing.assert_close(found.values, values[order[:3]], rtol=1e-8, atol=0)
    assert found.residuals.max() < 1e-5
    for i in range(3):
        v = flat(found.vectors[i])
        residual = (H @ v - found.values[i] * v).norm()
        torch.testing.assert_close(residual, found.residuals[i], rtol=0, atol=1e-6)  # deflation's
        assert abs(flat(found.vectors[i]) @ vectors[:, order[i]]).item() > 1 - 1e-6


@pytest.mark.parametrize("steps", [1, 3])
def test_eigenvectors_belong_to_their_values_when_steps_run_out(steps: int) -> None:
    loss, params, H = problem()
    found = monitor.top_hessian_eigenvalues(loss, params, 1, steps=steps, tol=0.0)
    v, value = flat(found.vectors[0]), found.values[0]
    torch.testing.assert_close(v @ H @ v, value)
    torch.testing.assert_close((H @ v - value * v).norm(), found.residuals[0])


def test_hutchinson_diagonal() -> None:
    loss, params, H = problem()
    got = flat(monitor.hessian_diagonal(loss, params, 400))
    spread = (H.square().sum(1) - H.diagonal().square()).sqrt() / math.sqrt(400)
    assert ((got - H.diagonal()).abs() <= 5 * spread + 1e-9).all()
    w = torch.randn(6, dtype=DOUBLE, requires_grad=True)
    exact = monitor.hessian_diagonal((w**4).sum(), [w], 1)[0]
    torch.testing.assert_close(exact, 12 * w.detach() ** 2)


def test_hessian_gradient_product_and_alignment() -> None:
    loss, params, H = problem()
    g, hg = monitor.hessian_gradient_product(loss, params)
    torch.testing.assert_close(flat(hg), H @ flat(g), rtol=1e-10, atol=1e-12)
    w = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    A, B = (x @ x.T for x in matrix("gaussian", 4, 4, batch=(2,)))
    penalty = monitor.hessian_alignment([w @ A @ w / 2, w @ B @ w / 2], [w], 0.5, 2.0)
    x = w.detach()
    half = lambda a, b: ((a - b) / 2).square().sum()  # noqa: E731
    want = 0.5 * half(A @ A @ x, B @ B @ x) + 2.0 * half(A @ x, B @ x)
    torch.testing.assert_close(penalty.detach(), want)
    assert torch.autograd.gradcheck(
        lambda w: monitor.hessian_alignment([(w**3).sum(), w.sin().sum()], [w]), (w,)
    )
    same = monitor.hessian_alignment([(w**3).sum(), (w**3).sum()], [w])
    assert same == 0


def test_hessian_arguments() -> None:
    w = torch.ones(2, requires_grad=True)
    for bad, text in (
        (lambda: monitor.hessian_product(w, [w]), "loss must be a scalar with a graph"),
        (lambda: monitor.hessian_product((w**2).sum(), []), "params must be one or more"),
        (lambda: monitor.top_hessian_eigenvalues((w**2).sum(), [w], 3), "k must be at most"),
        (lambda: monitor.hessian_alignment([w.sum()], [w]), "two or more"),
    ):
        with pytest.raises(ValueError, match=text):
            bad()
    model = nn.Linear(3, 1)
    (value,) = monitor.top_hessian_eigenvalues(model(torch.eye(3)).square().sum(),
                                               model.parameters()).values  # fmt: skip
    assert abs(value - 8) < 1e-2  # 2 [[I, 1], [1, 3]]: eigenvalues 8, 2, 2, 0


def test_projected_power_iteration() -> None:
    A = matrix("power law", 20, 20)
    V = A @ A.T
    values, vectors = torch.linalg.eigh(V)
    start = V[:, V.diagonal().argmax()]
    found = monitor.projected_power_iteration(V, lambda x: x, start, 200, 1e-14)
    torch.testing.assert_close(found.value, values[-1])
    assert abs(found.x @ vectors[:, -1]) > 1 - 1e-12 and found.steps < 200
    B = torch.linalg.qr(matrix("gaussian", 20, 3)).Q  # the range of a linear generator
    inside = monitor.projected_power_iteration(lambda x: V @ x, lambda x: B @ (B.T @ x), start, 500)
    torch.testing.assert_close(inside.value, torch.linalg.eigvalsh(B.T @ V @ B)[-1])
    with pytest.raises(ValueError, match="must not be 0, got 0 at step 1"):
        monitor.projected_power_iteration(V, torch.zeros_like, start)


def test_streaming_eigenvector() -> None:
    torch.manual_seed(0)
    direction = torch.linalg.qr(torch.randn(16, 1, dtype=DOUBLE)).Q[:, 0]
    stream = monitor.StreamingEigenvector(16, dtype=DOUBLE)
    rows = torch.randn(4000, 16, dtype=DOUBLE)
    rows += 9 * torch.randn(4000, 1, dtype=DOUBLE) * direction  # sigma_1^2 / sigma_2^2 near 80
    for block in rows.split(50):
        v = stream.update(block)
    top = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    assert abs(v @ top) > 1 - 1 / math.sqrt(80)  # the paper's 1 - O(1 / sqrt(R))
    torch.testing.assert_close(v.norm(), torch.ones((), dtype=DOUBLE))
    fixed = monitor.StreamingEigenvector(3, rate=0.5, dtype=DOUBLE)
    u, A = fixed.vector, matrix("gaussian", 5, 3)
    want = u + 0.5 * A.T @ (A @ u)
    torch.testing.assert_close(fixed.update(A), want / want.norm())


@pytest.mark.parametrize(("order", "L", "rank"), [(4, 6, 5), (4, 8, 12), (6, 4, 4)])
def test_subspace_power_method_recovers_the_terms(order: int, L: int, rank: int) -> None:
    a = matrix("gaussian", L, rank)
    a = a / a.norm(dim=0)
    values = torch.linspace(1, 2, rank, dtype=DOUBLE)
    terms = a
    for _ in range(order - 1):
        terms = torch.einsum("pr,ir->pir", terms, a).flatten(0, 1)
    T = (terms @ values).view((L,) * order)
    found = monitor.subspace_power_method(T, rank)
    assert found.residual < 1e-9
    match = (found.vectors.T @ a).abs()
    assert (match.amax(1) > 1 - 1e-9).all() and len(set(match.argmax(1).tolist())) == rank
    torch.testing.assert_close(found.values, values[match.argmax(1)], rtol=1e-8, atol=0)


def test_subspace_power_method_arguments() -> None:
    with pytest.raises(ValueError, match="even number of equal sides"):
        monitor.subspace_power_method(torch.zeros(3, 3, 3, 3, 3), 1)
    with pytest.raises(ValueError, match="rank must be at most 9, got 10"):
        monitor.subspace_power_method(torch.zeros(3, 3, 3, 3), 10)
