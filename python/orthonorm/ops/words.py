"""K1, the products that every orthogonalization consists of: gram, symmetric_update and apply.

Two forms of the iteration are made of them: direct_polynomial, and gram_form with gram_polynomial.
All take batches (leading dimensions), accumulate in float32 or better, store in the input's dtype
and return fresh contiguous tensors. Symmetric results are symmetric bit for bit.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .. import _checks as check
from .._library import op

SMALL = 128  # matrices with both sides up to this stay on chip through all iterations; see `fits`
CHAIN_BYTES = 104448  # shared memory of CUDA C++'s gram_polynomial for sides above SMALL // 2
CLUSTER = 256  # largest short side that a cluster of thread blocks takes
CLUSTER_BLOCKS, CLUSTER_BYTES = 4, 119808  # blocks of a cluster; shared memory of each
MOST = 3 * 128  # most coefficients that fit in the arguments of a compiled kernel's launch
HALF = (torch.float16, torch.bfloat16)


def fits(rows: int, cols: int) -> bool:
    """True if a CPU's core keeps such a matrix in its cache through all iterations.

    A single row or column fits at any length: only its norm is iterated.
    """
    return min(rows, cols) <= 1 or rows * cols <= SMALL**2


def _mirror(A: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one."""
    return A.tril() + A.tril(-1).mT


def addmm(C: Tensor, A: Tensor, B: Tensor, alpha: float, beta: float) -> Tensor:
    """Return beta C + alpha A B, rounded once, contiguous."""
    if C.dim() == 2:
        return torch.addmm(C, A, B, alpha=alpha, beta=beta).contiguous()
    flat = [t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in (C, A, B)]
    return torch.baddbmm(*flat, alpha=alpha, beta=beta).reshape(C.shape).contiguous()


@op("gram(Tensor X) -> Tensor")
def gram(X: Tensor) -> Tensor:
    """X X^T, symmetric bit for bit. For the other side pass X.mT.

    Shapes: X is (..., m, n) with any strides, the result (..., m, m).
    """
    return _mirror(X @ X.mT)


@op("gram_update_(Tensor(a!) A, Tensor X, float alpha=1.0, float beta=1.0) -> ()", composite=True)
def gram_update_(A: Tensor, X: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """A <- beta A + alpha X X^T for symmetric A, symmetric bit for bit.

    It makes sums and averages of Gram matrices. Only the lower triangle of A is read. A must not
    overlap X.

    Shapes: X is (..., m, n) with any strides, A (..., m, m).
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    A.copy_(_mirror(beta * A.to(dtype) + alpha * gram(X).to(dtype)))


@op("symmetric_update(Tensor C, Tensor A, Tensor B, float alpha=1.0, float beta=0.0) -> Tensor")
def symmetric_update(
    C: Tensor, A: Tensor, B: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """beta C + alpha A B for symmetric C and commuting symmetric A, B: symmetric bit for bit.

    The caller promises that A B is symmetric, as for polynomials of one matrix; only the lower
    triangle is used. `symmetric_update(A, A, A, c, b)` is b A + c A^2.

    Shapes: (..., n, n) throughout.
    """
    return _mirror(addmm(C, A, B, alpha, beta))


@op("apply(Tensor X, Tensor B, float a, float b=1.0) -> Tensor")
def apply(X: Tensor, B: Tensor, a: float, b: float = 1.0) -> Tensor:
    """a X + b B X.

    Shapes: X is (..., m, n), B (..., m, m), the result (..., m, n).
    """
    return addmm(X, B, X, b, a)


Triple = tuple[float, float, float]
Triples = list[Triple]


def triples_of(coefficients: list[float]) -> Triples:
    a, b, c = coefficients[::3], coefficients[1::3], coefficients[2::3]
    return list(zip(a, b, c, strict=True))


@op("gram_polynomial(Tensor R, float[] coefficients) -> Tensor", composite=True)
def gram_polynomial(R: Tensor, coefficients: list[float]) -> Tensor:
    """Q with Q X = p_k(...p_1(X)) for R = X X^T and p_i(X) = a X + b R X + c R^2 X.

    Z = b R + c R^2;  Q <- a Q + Q Z, at first a I + Z;  W = a R + R Z;  R <- a W + W Z
    (Gram Newton-Schulz, Dao-AILab). With c = 0 the square is skipped. The result is symmetric bit
    for bit if R is.

    Shapes: R and the result are (..., n, n); coefficients a, b, c of every iteration, flattened.
    """
    Q = None
    triples = triples_of(coefficients)
    for t, (a, b, c) in enumerate(triples):
        Z, z = (R, b) if c == 0 else (symmetric_update(R, R, R, c, b), 1.0)
        if Q is None:
            # in float32: half precision would round a itself, with one error all along the diagonal
            Q = z * Z.to(torch.promote_types(Z.dtype, torch.float32))
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
            Q = Q.to(Z.dtype)
        else:
            Q = symmetric_update(Q, Q, Z, z, a)
        if t + 1 < len(triples):
            W = symmetric_update(R, R, Z, z, a)
            R = symmetric_update(W, W, Z, z, a)
    assert Q is not None
    return Q.contiguous()


@gram_polynomial.serves_part("sides up to 128, on sm_90 up to 256, in float16 or bfloat16")
def _(R: Tensor, coefficients: list[float]) -> bool:
    n = R.shape[-1]
    if n > SMALL:
        return _on_clusters(R, coefficients)
    if R.dtype not in HALF or len(coefficients) > MOST:
        return False
    return n <= SMALL // 2 or _shared_bytes(R) >= CHAIN_BYTES  # sm_86, 89 and 120 have less


def _shared_bytes(X: Tensor) -> int:
    """Return the shared memory that a block can have; without a GPU (in tests), enough."""
    if not X.is_cuda:
        return CLUSTER_BYTES
    device = torch.cuda.get_device_properties(X.device)
    return int(device.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _on_clusters(X: Tensor, coefficients: list[float]) -> bool:
    """True if clusters of blocks can keep all of batch X on chip at once.

    Larger batches and matrices are faster with a launch for each product (csrc/cuda/README.md).
    """
    n, m = sorted(X.shape[-2:])
    if X.dtype not in HALF or n > CLUSTER or m > 2 * CLUSTER or len(coefficients) > MOST:
        return False
    if _shared_bytes(X) < CLUSTER_BYTES:
        return False
    if not X.is_cuda:
        return True
    device = torch.cuda.get_device_properties(X.device)
    blocks = CLUSTER_BLOCKS * math.prod(X.shape[:-2])
    # a cluster lies in one GPC, of at least 16 multiprocessors: 18 hold no more clusters of 4
    resident = device.multi_processor_count // 16 * 16
    return device.major >= 9 and blocks <= resident


@op("direct_polynomial(Tensor X, float[] coefficients) -> Tensor", composite=True)
def direct_polynomial(X: Tensor, coefficients: list[float]) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, for each (a, b, c); without the square if c = 0.

    Shapes: X and the result are (..., m, n); tall matrices iterate on X^T.
    """
    Y = wide(X)
    for a, b, c in triples_of(coefficients):
        A = gram(Y)
        Y = apply(Y, A, a, b) if c == 0 else apply(Y, symmetric_update(A, A, A, c, b), a)
    return (Y if Y.shape == X.shape else Y.mT).contiguous()


@direct_polynomial.serves_part("on sm_90 up to 256 x 512 in float16 or bfloat16")
def _(X: Tensor, coefficients: list[float]) -> bool:
    return _on_clusters(X, coefficients)


def wide(X: Tensor) -> Tensor:
    """Return X, or X^T if it is tall: the rows are the short side."""
    return X if X.shape[-2] <= X.shape[-1] else X.mT


def segments(triples: Triples, restarts: list[int]) -> list[Triples]:
    """Split iterations into runs, between which the Gram form computes X again."""
    inner = [r for r in restarts if 0 < r < len(triples)]
    bounds = itertools.pairwise((0, *inner, len(triples)))
    return [triples[start:end] for start, end in bounds]


@op("gram_form(Tensor X, float[] coefficients, int[] restarts) -> Tensor", composite=True)
def gram_form(X: Tensor, coefficients: list[float], restarts: list[int]) -> Tensor:
    """X <- Q X with Q = `gram_polynomial(X X^T)`: `direct_polynomial` by the small Gram matrix.

    X is computed again before the iterations in `restarts`. For bfloat16 matrices the Gram matrix
    and its iterations are in float32, since bfloat16 would be unsafe there. Only X and Q are
    rounded to bfloat16.

    Shapes: X and the result are (..., m, n); tall matrices iterate on X^T.
    Source: Gram Newton-Schulz, github.com/Dao-AILab/gram-newton-schulz.
    """
    Y = wide(X)
    chain = torch.float32 if X.dtype == torch.bfloat16 else X.dtype
    for segment in segments(triples_of(coefficients), restarts):
        flat = [number for triple in segment for number in triple]
        Q = gram_polynomial(gram(Y.to(chain)), flat)
        Y = apply(Y, Q.to(X.dtype), 0.0)
    return (Y if Y.shape == X.shape else Y.mT).contiguous()


@gram_form.check
def _(X: Tensor, coefficients: list[float], restarts: list[int]) -> None:
    check.tensor("gram_form", "X", X, min_dim=2)
    check_coefficients("gram_form", coefficients)
    check_restarts("gram_form", restarts, len(coefficients) // 3)


def check_restarts(name: str, restarts: list[int], iterations: int) -> None:
    for r in restarts:
        check.integer(name, "restarts", r, 1)
        if r >= iterations:
            raise ValueError(
                f"{name}: restarts must lie before the last of {iterations} iterations, got {r}"
            )


@direct_polynomial.check
def _(X: Tensor, coefficients: list[float]) -> None:
    check.tensor("direct_polynomial", "X", X, min_dim=2)
    check_coefficients("direct_polynomial", coefficients)


def check_coefficients(name: str, coefficients: list[float]) -> None:
    if len(coefficients) == 0 or len(coefficients) % 3:
        raise ValueError(
            f"{name}: coefficients must be (a, b, c) per iteration, got {len(coefficients)} numbers"
        )
    for value in coefficients:
        check.number(name, "coefficients", value, -1e6, 1e6)


@gram_polynomial.check
def _(R: Tensor, coefficients: list[float]) -> None:
    _square("gram_polynomial", "R", R)
    check_coefficients("gram_polynomial", coefficients)


def _square(name: str, label: str, A: Tensor) -> None:
    check.tensor(name, label, A, min_dim=2)
    if A.shape[-1] != A.shape[-2]:
        raise ValueError(f"{name}: {label} must be square, got shape {check.shape(A)}")


@gram.check
def _(X: Tensor) -> None:
    check.tensor("gram", "X", X, min_dim=2)


@gram_update_.check
def _(A: Tensor, X: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    name = "gram_update_"
    check.tensor(name, "X", X, min_dim=2)
    _square(name, "A", A)
    check.equal_shape(name, "A", A, (*X.shape[:-1], X.shape[-2]))
    check.same_device(name, A=[A], X=[X])
    check.same_dtype(name, A=A, X=X)
    check.number(name, "alpha", alpha)
    check.number(name, "beta", beta)


@symmetric_update.check
def _(C: Tensor, A: Tensor, B: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
    name = "symmetric_update"
    for label, value in (("C", C), ("A", A), ("B", B)):
        _square(name, label, value)
    check.same_shapes(name, C=[C], A=[A], B=[B])
    check.same_dtype(name, C=C, A=A, B=B)
    check.number(name, "alpha", alpha)
    check.number(name, "beta", beta)


@apply.check
def _(X: Tensor, B: Tensor, a: float, b: float = 1.0) -> None:
    name = "apply"
    check.tensor(name, "X", X, min_dim=2)
    _square(name, "B", B)
    check.equal_shape(name, "B", B, (*X.shape[:-1], X.shape[-2]))
    check.same_device(name, X=[X], B=[B])
    check.same_dtype(name, X=X, B=B)
    check.number(name, "a", a)
    check.number(name, "b", b)
