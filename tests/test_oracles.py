"""Every optimizer's recursion against its NumPy transcription: 20 steps in float64, to 1e-10."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from optimizer_rows import make, set_grads
from oracle_manifolds import MANIFOLDS
from oracle_muon import adamuon, muon, normuon
from oracle_norms import scion, signum, trust_region
from oracle_relatives import RELATIVES
from oracle_whitening import shampoo, soap, splus
from oracles import Oracle
from orthonorm import optim
from orthonorm.coefficients import COEFFICIENTS
from orthonorm.optim.settings import ADJUST

SHAPES = ((12, 7), (7, 12), (9, 9), (5, 1))
FULL = dict(precision="full")
ALIASES = {"shape_scaling": "original", "rms_norm": "match_rms_adamw", "unit_rms_norm": "spectral",
           "spectral_norm": "spectral", "spectral_unclamped": "spectral"}  # fmt: skip


def presets() -> list[Any]:
    """Muon with every coefficient set that is safe to run."""
    found = []
    for name, c in COEFFICIENTS.items():
        if c.prescale != "frobenius" or c.image()[0] < 0:
            continue
        kwargs = dict(lr=0.02, ns_coefficients=name, ns_steps=None, **FULL)
        ours = dict(lr=0.02, triples=c.steps(), safety=c.safety)
        found.append(("Muon", kwargs, muon, ours))
    return found


def composite(norm: str) -> Any:
    ours = dict(lr=0.3, weight_decay=0.5, norm=norm)
    return "TrustRegion", dict(ours, decay="composite"), trust_region, dict(ours, composite=True)


def trust(norm: str) -> Any:
    ours = dict(lr=0.1, weight_decay=0.1, norm=norm)
    return "TrustRegion", dict(ours, **FULL), trust_region, dict(ours, composite=False)


def scions(name: str, **kwargs: Any) -> Any:
    ours = {**kwargs, "alpha": kwargs.get("momentum", 1.0), "light": name == "ScionLight"}
    ours.pop("momentum", None)
    return name, dict(kwargs, **FULL), scion, ours


CASES = [
    *(("Muon", dict(lr=0.02, adjust_lr_fn=a, **FULL), muon,
       dict(lr=0.02, adjust=ALIASES.get(a, a))) for a in ADJUST),
    ("Muon", dict(lr=0.02, heavy_ball=True, momentum=0.8, **FULL), muon,
     dict(lr=0.02, heavy_ball=True, mu=0.8)),
    ("Muon", dict(lr=0.02, nesterov=False, **FULL), muon, dict(lr=0.02, nesterov=False)),
    *(("Muon", dict(lr=0.1, decay=d, bound=0.6, weight_decay=0.5, **FULL), muon,
       dict(lr=0.1, decay=d, bound=0.6, weight_decay=0.5)) for d in ("cautious", "clipped")),
    *presets(),
    ("NorMuon", dict(FULL, weight_decay=0.1), normuon, dict(lr=0.02, weight_decay=0.1)),
    ("NorMuon", dict(FULL, axis="long"), normuon, dict(lr=0.02, axis="long")),
    ("NorMuon", dict(FULL, rescale="rms"), normuon, dict(lr=0.02, rescale="rms")),
    ("AdaMuon", FULL, adamuon, dict(lr=0.02)),
    ("AdaMuon", dict(FULL, sign=True), adamuon, dict(lr=0.02, sign=True)),
    ("AdaMuon", dict(FULL, rescale="none", lr=1e-3), adamuon, dict(lr=1e-3, rescale="none")),
    ("Shampoo", dict(lr=0.1), shampoo, dict(lr=0.1)),
    # averages of a few gradients are singular: the default eps makes 1e-9 of their rounding
    ("Shampoo", dict(lr=0.1, momentum=0.9, beta2=0.95, eps=1e-4, precondition_frequency=3), shampoo,
     dict(lr=0.1, mu=0.9, beta2=0.95, eps=1e-4, frequency=3)),
    ("Shampoo", dict(lr=0.01, momentum=0.9, beta2=0.99, eps=0.5, precondition_frequency=4,
     variant="study"), shampoo,
     dict(lr=0.01, mu=0.9, beta2=0.99, eps=0.5, frequency=4, study=True)),
    ("Signum", dict(lr=0.01, weight_decay=0.3), signum, dict(lr=0.01, weight_decay=0.3)),
    *(make_case(norm) for norm in ("spectral", "max", "frobenius") for make_case in
      (trust, composite)),
    scions("Scion", lr=0.1),
    scions("Scion", lr=0.1, momentum=0.1, scale=3.0, normalized=False),
    scions("Scion", lr=0.1, momentum=0.1, unconstrained=True, largest=True, normalized=True),
    *(scions("Scion", lr=0.1, momentum=0.3, norm=norm, normalized=n, transpose=t)
      for norm in ("column", "row") for n in (True, False) for t in (True, False)),
    scions("Scion", lr=0.1, norm="sign", normalized=True, momentum=0.2),
    scions("Scion", lr=0.1, norm="embed_sqrt", transpose=True),
    *(scions("Scion", lr=0.1, norm=norm, unconstrained=True)
      for norm in ("embed_linear", "embed_sqrt", "unembed_linear", "unembed_sqrt")),
    scions("ScionLight", lr=0.1, momentum=0.1),
    scions("ScionLight", lr=0.1, momentum=0.3, norm="sign", normalized=True),
    *RELATIVES,
    *MANIFOLDS,
]  # fmt: skip


def name_of(case: Any) -> str:
    return case[0] + "-" + "-".join(f"{v}" for k, v in case[1].items() if k != "precision")


def shapes_of(name: str, kwargs: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    if name in ("Scion", "ScionLight") and "norm" not in kwargs:
        return (*SHAPES, (6,))
    if kwargs.get("variant") == "study":  # roots of singular averages are rounding errors
        return ((9, 9), (7, 7))
    return SHAPES


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_recursion(case: Any) -> None:
    name, kwargs, rule, same = case
    shapes = shapes_of(name, kwargs)
    ours, theirs = make(torch.float64, shapes), make(torch.float64, shapes)
    a, b = optim.REGISTRY[name](ours, **kwargs), Oracle(theirs, rule, **same)
    for step in range(20):
        kept = [p.grad for p in ours]
        set_grads(step, ours, theirs)
        if name == "ScionLight":  # as backward would, onto what the step left
            for p, old in zip(ours, kept, strict=True):
                p.grad = p.grad if old is None else p.grad + old
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-10)


SOAPS = [
    (dict(precondition_frequency=3, weight_decay=0.1), dict(frequency=3, weight_decay=0.1)),
    (dict(precondition_frequency=3, weight_decay=0.0, variant="study"),
     dict(frequency=3, study=True)),
    (dict(precondition_frequency=4, weight_decay=0.0, max_precond_dim=8, betas=(0.9, 0.99),
          shampoo_beta=0.8), dict(frequency=4, longest=8, betas=(0.9, 0.99), shampoo_beta=0.8)),
]  # fmt: skip


SPLUS: Any = (dict(precondition_frequency=3, weight_decay=0.1), dict(frequency=3, weight_decay=0.1))
EIGENBASES = [
    *(("SOAP", soap, *pair) for pair in SOAPS),
    ("SPlus", splus, *SPLUS),
    ("SPlus", splus, dict(SPLUS[0], max_precond_dim=8), dict(SPLUS[1], longest=8)),
]


@pytest.mark.parametrize(
    ("name", "rule", "kwargs", "same"), EIGENBASES,
    ids=["soap", "study", "short side", "splus", "splus, short side"],
)  # fmt: skip
def test_eigenbases(name: str, rule: Any, kwargs: dict[str, Any], same: dict[str, Any]) -> None:
    """The first averages of tall and wide matrices are singular, so their eigenvectors are not
    unique: the transcription checks ours and goes on from them."""
    shapes = ((12, 7), (7, 12), (9, 9))
    ours, theirs = make(torch.float64, shapes), make(torch.float64, shapes)
    a = optim.REGISTRY[name](ours, lr=0.01, **kwargs)
    b = Oracle(theirs, rule, lr=0.01, **same)
    for step in range(20):
        set_grads(step, ours, theirs)
        a.step()
        b.step()
        for p, s in zip(ours, b.state, strict=True):
            for ours_key, key, gram in (("left", "QL", "L"), ("right", "QR", "R")):
                Q = a.state[p][f"{ours_key}_basis"].numpy()
                if step == 0 and Q.size:
                    values = Q.T @ s[gram] @ Q
                    np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-12)
                    np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-12)
                    assert (np.diff(np.diag(values)) <= 1e-12).all()
                    s[key] = Q.copy()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-10)


def test_adago_adds_on_in_half_types() -> None:
    """600 norms of one size: in bfloat16 alone their sum would stop at 256 of them."""
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    opt = optim.AdaGO([p], lr=0.0)
    p.grad = torch.full_like(p, 0.5)
    for _ in range(600):
        opt.step()
    assert opt.state[p]["norm_sum"].double().sum() == 600.0
