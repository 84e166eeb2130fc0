"""Libraries of functions that orthonorm.compat stands for, as installed: `make frameworks`.

KellerJordan/Muon and microsoft/dion are in no package index: tests/test_compat.py has formulas
and signatures of these.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from typing import Any

import pytest
import torch
from test_frameworks import needs
from torch import Tensor


def fits(ours: Any, theirs: Any) -> None:
    """Every call of theirs is one of ours: their parameters in their order, with their defaults."""
    mine = list(inspect.signature(ours).parameters.values())
    for a, b in zip(inspect.signature(theirs).parameters.values(), mine, strict=False):
        assert a.name == b.name and a.default in (inspect.Parameter.empty, b.default), (a, b)
    assert len(mine) >= len(inspect.signature(theirs).parameters)


def as_exact(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm()


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Emerging-Optimizers, which imports `typing.override` of Python 3.12."""
    from typing_extensions import override

    monkeypatch.setattr(typing, "override", override, raising=False)
    return importlib.import_module("emerging_optimizers.orthogonalized_optimizers")


@needs("emerging_optimizers", "absl")
def test_emerging_optimizers(nvidia: Any) -> None:
    from orthonorm.compat import emerging_optimizers as ours

    theirs = nvidia.muon_utils
    fits(ours.newton_schulz, theirs.newton_schulz)
    fits(ours.newton_schulz_tp, theirs.newton_schulz_tp)
    fits(ours.get_muon_scale_factor, nvidia.get_muon_scale_factor)
    for m, n in ((24, 40), (40, 24), (5, 5)):
        for mode in ours.SCALES:
            assert ours.get_muon_scale_factor(m, n, mode) == pytest.approx(
                nvidia.get_muon_scale_factor(m, n, mode), rel=1e-15
            )
    assert set(ours.SETS) == set(theirs._COEFFICIENT_SETS)
    for name in set(ours.SETS) - {"aol"}:  # which ours refuses
        ends = "repeat_last" if ours.SETS[name][1] == "repeat_last" else "cycle"
        for shape in ((24, 40), (40, 24), (60, 10, 6)):  # few elements are luck
            x = torch.randn(shape)
            X = x.double().mT if shape[-2] > shape[-1] else x.double()
            X = X / X.norm(dim=(-2, -1), keepdim=True)
            sets = theirs._COEFFICIENT_SETS[name]
            for a, b, c in theirs.get_coefficient_iterator(7, sets, mode=ends):
                A = X @ X.mT
                X = a * X + (b * A + c * A @ A) @ X
            exact = X.mT if shape[-2] > shape[-1] else X
            arguments = (x, 7, name)
            as_exact(ours.newton_schulz(*arguments), theirs.newton_schulz(*arguments), exact)


@needs("gram_newton_schulz")
@pytest.mark.parametrize("gram", [True, False])
def test_gram_newton_schulz(gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from orthonorm.compat import gram_newton_schulz as ours

    theirs = importlib.import_module("gram_newton_schulz")
    for name in ("YOU_COEFFICIENTS", "POLAR_EXPRESS_COEFFICIENTS"):
        assert [*map(tuple, getattr(ours, name))] == [*map(tuple, getattr(theirs, name))]

    settings: dict[str, Any] = dict(ns_use_kernels=False, use_gram_newton_schulz=gram)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # minutes on a CPU
    a, b = (x.GramNewtonSchulz(**settings) for x in (ours, theirs))
    fits(a.__call__, b.__call__)
    assert list(inspect.signature(ours.GramNewtonSchulz).parameters) == list(
        inspect.signature(theirs.GramNewtonSchulz).parameters
    )
    for shape in ((24, 40), (40, 24), (2, 10, 30)):
        x = torch.randn(shape)
        X = x.double().mT if shape[-2] > shape[-1] else x.double()
        X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for u, v, w in theirs.POLAR_EXPRESS_COEFFICIENTS:
            A = X @ X.mT
            X = u * X + (v * A + w * A @ A) @ X
        as_exact(a(x), b(x), X.mT if shape[-2] > shape[-1] else X)
