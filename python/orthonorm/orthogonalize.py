"""The K1 algorithm, written once over the words of `ops/words.py`.

X is wide or square here (rows <= columns), already scaled; callers transpose.

direct   `direct_polynomial`: A = X X^T;  X <- a X + (b A + c A^2) X             per iteration
gram     X <- Q X with Q = `gram_polynomial(X X^T)`, in segments between restarts
         (Gram Newton-Schulz, Dao-AILab; the long side is touched once per segment)
With c = 0 the square is skipped.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.words import Triples, apply, gram, gram_polynomial

# Our float32 products against torch's in bfloat16 on AVX512-BF16: 450 of 900 GFLOP/s, two cores of
# an AMD EPYC; with what surrounds the products, float32 is chosen where it costs 0.85 of theirs.
FLOAT32_RATE = 0.5 * 0.85  # 2026-11
SMALL = 128  # matrices with both sides up to this stay in one core's cache through all iterations


class Choice(NamedTuple):
    """How one matrix is iterated."""

    form: str  # "direct" or "gram"
    dtype: torch.dtype
    small: bool


def flat(triples: Triples) -> list[float]:
    return [number for triple in triples for number in triple]


def segments(triples: Triples, restarts: list[int]) -> list[Triples]:
    """The iterations between which the Gram form forms X again."""
    inner = [r for r in restarts if 0 < r < len(triples)]
    bounds = itertools.pairwise((0, *inner, len(triples)))
    return [triples[start:end] for start, end in bounds]


def gram_form(X: Tensor, triples: Triples, restarts: list[int]) -> Tensor:
    """The same polynomial on R = X X^T; X is formed again only before iterations in `restarts`."""
    for segment in segments(triples, restarts):
        Q = gram_polynomial(gram(X), flat(segment))
        X = apply(X, Q, 0.0)
    return X


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose(X: Tensor, triples: Triples, restarts: list[int], form: str, precision: str) -> Choice:
    """Form and dtype for a matrix: the most accurate that is no slower than bf16 in direct form.

    `form` and `precision` are obeyed when they are not "auto". Costs are compared only where they
    decide: under torch.compile every comparison of sizes is a guard.
    """
    n, m = sorted(X.shape[-2:])
    small = m <= SMALL and form != "gram"
    if precision == "full":
        dtype = X.dtype if X.dtype == torch.float64 else torch.float32
    elif precision != "auto":
        dtype = getattr(torch, precision)
    elif X.dtype == torch.float64:
        dtype = torch.float64
    elif X.device.type != "cpu":
        dtype = torch.float16
    elif small or n <= 1 or form == "gram" or not _fast_bfloat16(X.device):
        dtype = torch.float32
    else:
        limit = FLOAT32_RATE * _full_cost(X, triples)
        exact = form == "auto" and _gram_cost(X, triples, restarts) < limit
        dtype = torch.float32 if exact else torch.bfloat16
    if form == "auto":
        pays = dtype != torch.bfloat16 and not small and len(triples) > 1 and n > 1
        gram_pays = pays and _gram_cost(X, triples, restarts) < _direct_cost(X, triples)
        form = "gram" if gram_pays else "direct"
    return Choice(form, dtype, small)


# Costs in units of n^3 multiply-adds times two, n the short side; symmetric products count half.
def _aspect(X: Tensor) -> float:
    n, m = sorted(X.shape[-2:])
    return m / n


def _direct_cost(X: Tensor, triples: Triples) -> float:
    return sum(3 * _aspect(X) + (c != 0) for _, _, c in triples)


def _gram_cost(X: Tensor, triples: Triples, restarts: list[int]) -> float:
    sweeps = 1 + len(restarts)
    return sum(3 + (c != 0) for _, _, c in triples) + 3 * (_aspect(X) - 1) * sweeps


def _full_cost(X: Tensor, triples: Triples) -> float:
    """The direct form by products that know nothing of symmetry, as torch.optim.Muon's."""
    return sum(4 * _aspect(X) + 2 * (c != 0) for _, _, c in triples)
