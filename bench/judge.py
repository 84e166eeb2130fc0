"""Judges: how far a result is from the exact polynomial and from the polar factor."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Outputs

LIMIT = 2**32  # sum of n^2 m of the matrices whose singular values are taken (about 5 s)


def relative_error(got: Outputs, want: Outputs) -> float | None:
    """Largest |got - want|_F / |want|_F over the outputs both have; None if they share none."""
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
    """The matrices of a list of batches."""
    return [m for t in tensors for m in t.reshape(-1, *t.shape[-2:])]


class PolarJudge:
    """Compares results with the polar factors of their inputs, on the first matrices that a few
    seconds of float64 singular value decompositions allow. Directions whose singular value is zero
    to rounding have no polar factor and do not count."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.factors: list[Tensor] = []
        spent = 0
        for x in matrices(inputs):
            n, m = sorted(x.shape)
            spent += n * n * m
            if spent > LIMIT or n == 0:
                break
            U, s, Vh = torch.linalg.svd(x.double(), full_matrices=False)
            kept = s > s[0] * m * torch.finfo(torch.float64).eps
            self.factors.append(U[:, kept] @ Vh[kept])

    def __call__(self, results: list[Tensor]) -> Verdict | None:
        got = [q.double() for q in matrices(results)[: len(self.factors)]]
        if not got or not all(bool(torch.isfinite(q).all()) for q in got):
            return None
        error = relative_error({"": got}, {"": self.factors})
        sigmas = [torch.linalg.svdvals(q) for q in got]
        low, high = min(float(s[-1]) for s in sigmas), max(float(s[0]) for s in sigmas)
        return None if error is None else Verdict(error, low, high)
