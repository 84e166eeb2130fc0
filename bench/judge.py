"""Judges of results: their distance to the float64 reference and to the polar factor."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Outputs

# Largest sum of n^2 m of the matrices whose SVD is taken: about 5 s on a CPU. On a GPU, whose SVDs
# wait for one small step after the other, a single 768 x 768 (an estimate).
LIMITS = {"cpu": 2**32, "cuda": 2**29}


def relative_error(got: Outputs, want: Outputs) -> float | None:
    """Return the largest |got - want|_F / |want|_F over outputs that both have; None if none."""
    worst = None
    for name in got.keys() & want.keys():
        off = scale = 0.0
        for a, b in zip(got[name], want[name], strict=True):
            wide = b.double()
            off += float((a.double().reshape(wide.shape) - wide).square().sum())
            scale += float(wide.square().sum())
        error = math.sqrt(off / scale) if scale else math.sqrt(off)
        worst = error if worst is None else max(worst, error)
    return worst


class Verdict(NamedTuple):
    """|Q - U V^T|_F / |U V^T|_F, and the extreme singular values of Q."""

    polar_error: float
    sigma_min: float
    sigma_max: float


def matrices(tensors: list[Tensor]) -> list[Tensor]:
    """Return the matrices of a list of batches, one by one."""
    return [m for t in tensors for m in t.reshape(-1, *t.shape[-2:])]


class PolarJudge:
    """Compares results with the polar factors of their inputs.

    Only the first matrices are judged, as many as float64 SVDs of a few seconds allow (LIMITS).
    Directions whose singular value is zero to rounding have no polar factor and do not count.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self.factors: list[Tensor] = []
        spent = 0
        for x in matrices(inputs):
            n, m = sorted(x.shape)
            spent += n * n * m
            if spent > LIMITS[x.device.type] or n == 0:
                break
            U, s, Vh = torch.linalg.svd(x.double(), full_matrices=False)
            nonzero = s > s[0] * m * torch.finfo(torch.float64).eps
            self.factors.append(U[:, nonzero] @ Vh[nonzero])

    def __call__(self, results: list[Tensor]) -> Verdict | None:
        got = [q.double() for q in matrices(results)[: len(self.factors)]]
        if not got or not all(bool(torch.isfinite(q).all()) for q in got):
            return None
        error = relative_error({"": got}, {"": self.factors})
        sigmas = [torch.linalg.svdvals(q) for q in got]
        low, high = min(float(s[-1]) for s in sigmas), max(float(s[0]) for s in sigmas)
        return None if error is None else Verdict(error, low, high)
