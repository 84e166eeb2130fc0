"""Peers from other packages, which are found by name and never required.

Names and signatures are those of the versions noted here. A package that is not installed, cannot
be imported or fails gives a row that says why.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from orthonorm._polynomials import KELLER
from torch import Tensor

from .candidates import Peer, Running, Unavailable
from .cases import Case
from .inputs import DTYPES, Arguments

SOURCES = {
    "pytorch_optimizer": "pip install pytorch_optimizer",  # 4.1.0
    "heavyball": "pip install heavyball",  # 3.2.1
    "gram_newton_schulz": "pip install gram-newton-schulz",  # 0.1.6
    "muonium": "pip install muonium",  # 0.2.0
    "dion": "pip install git+https://github.com/microsoft/dion",  # on no index (2026-11)
    "emerging_optimizers": "pip install git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers",
}
Triples = list[tuple[float, float, float]]
Function = Callable[[Tensor], Tensor]
Settings = dict[str, Any]


def load(module: str) -> Any:
    """Import a module of a package; raise Unavailable, with the reason, if that fails."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"not installed ({SOURCES[package]})")
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a foreign package may raise when imported
        raise Unavailable(f"cannot be imported: {type(error).__name__}: {error}"[:160]) from None


def triples_of(arguments: Arguments) -> Triples:
    """Return the coefficients as triples."""
    flat = arguments["coefficients"]
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def repeated(triples: Sequence[tuple[float, ...]]) -> bool:
    """True if all triples are Keller Jordan's (3.4445, -4.775, 2.0315)."""
    return set(triples) == {KELLER}


def _half(arguments: Arguments, on_gpu: torch.dtype = torch.bfloat16) -> torch.dtype:
    """Return the dtype for a peer that has a choice: the one asked for, else a fast one."""
    x = arguments["X"][0]
    return DTYPES.get(arguments.get("precision", ""), on_gpu if x.is_cuda else torch.bfloat16)


# ---- polynomials: (function, dtype of its products, True if it computes our numbers) -------------
Made = tuple[Function, torch.dtype, bool]


def _pytorch_optimizer(a: Arguments) -> Made:
    f = load("pytorch_optimizer.optimizer.utils.matrix").zero_power_via_newton_schulz_5
    triples, dtype = triples_of(a), _half(a)
    return lambda x: f(x, len(triples), weights=triples, dtype=dtype), dtype, True


def _pytorch_optimizer_gram(a: Arguments) -> Made:
    f = load("pytorch_optimizer.optimizer.utils.matrix").zero_power_via_gram_newton_schulz
    triples, dtype = triples_of(a), _half(a, torch.float16)
    return lambda x: f(x, len(triples), weights=triples, dtype=dtype), dtype, True


def _gram_newton_schulz(a: Arguments) -> Made:
    """Always float16; on CUDA with quack's kernels and torch.compile, its defaults."""
    gns = load("gram_newton_schulz").GramNewtonSchulz
    more = {} if a["X"][0].is_cuda else dict(ns_use_kernels=False, compile_kwargs=None)
    return gns(ns_coefficients=[list(t) for t in triples_of(a)], **more), torch.float16, True


def _heavyball(a: Arguments) -> Made:
    """Compiled; bfloat16 by stochastic rounding; five fixed triples of its own."""
    if len(triples_of(a)) != 5:
        raise Unavailable("takes five steps")
    return load("heavyball.utils").inplace_orthogonal_, torch.bfloat16, False


def _muonium(a: Arguments) -> Made:
    f, triples = load("muonium.orthogonalize.orthogonalize").zeropower, triples_of(a)
    if not repeated(triples):
        raise Unavailable("takes (3.4445, -4.775, 2.0315) only")
    on_gpu = a["X"][0].is_cuda
    return lambda x: f(x, steps=len(triples), use_triton=on_gpu), torch.bfloat16, True


def _dion(a: Arguments) -> Made:
    """Compiled; bfloat16; five fixed triples of its own; Triton on CUDA."""
    module = load("dion.newton_schulz_triton")
    if len(triples_of(a)) != 5:
        raise Unavailable("takes five steps")
    name = "newton_schulz_triton" if a["X"][0].is_cuda else "zeropower_via_newtonschulz5"
    return getattr(module, name), torch.bfloat16, False


def _emerging_optimizers(a: Arguments) -> Made:
    """float32 input; products as torch.set_float32_matmul_precision says."""
    module = load("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    triples = triples_of(a)
    if any(x.dtype != torch.float32 or x.dim() != 2 for x in a["X"]):
        raise Unavailable("takes one float32 matrix at a time")
    settings: Settings = dict(coefficient_type="custom", custom_coefficient_sets=triples)
    return lambda x: module.newton_schulz(x, len(triples), **settings), torch.float32, True


def _polynomial(label: str, package: str, kind: str, make: Callable[[Arguments], Made]) -> Peer:
    """Return the peer of a package's polynomial; `make` loads it for given arguments."""

    def start(case: Case, calls: list[Arguments]) -> Running:
        (a,) = calls
        f, dtype, same = make(a)
        X = a["X"]
        name = str(dtype).removeprefix("torch.")
        asked = a.get("precision", name)
        if asked in DTYPES and asked != name:
            raise Unavailable(f"computes in {name} only")
        return Running(lambda: [f(x) for x in X], lambda r: {"result": r}, dtype=name, same=same)

    return Peer(label, kind, start, package)


POLYNOMIALS = (
    _polynomial("pytorch_optimizer", "pytorch_optimizer", "package", _pytorch_optimizer),
    _polynomial("pytorch_optimizer Gram", "pytorch_optimizer", "package", _pytorch_optimizer_gram),
    _polynomial("gram-newton-schulz", "gram_newton_schulz", "package", _gram_newton_schulz),
    _polynomial("heavyball", "heavyball", "compiled", _heavyball),
    _polynomial("muonium", "muonium", "compiled", _muonium),
    _polynomial("dion", "dion", "compiled", _dion),
    _polynomial("Emerging-Optimizers", "emerging_optimizers", "package", _emerging_optimizers),
)


# ---- optimizers: made from the settings that their step in `cases.py` shares with peers ----------
def _pytorch_optimizer_muon(params: list[Tensor], s: Settings) -> Any:
    groups = [{"params": params, "use_muon": True}]
    return load("pytorch_optimizer").Muon(groups, **s)


def _pytorch_optimizer_conda(params: list[Tensor], s: Settings) -> Any:
    return load("pytorch_optimizer").Conda(params, scale=0.25, update_proj_gap=10**9, **s)


def _heavyball_muon(params: list[Tensor], s: Settings) -> Any:
    betas = (s["momentum"], 0.95)
    module = load("heavyball")
    return module.Muon(params, lr=s["lr"], betas=betas, weight_decay=s["weight_decay"])


def _gram_newton_schulz_muon(params: list[Tensor], s: Settings) -> Any:
    more = dict(ns_use_kernels=params[0].is_cuda)
    return load("gram_newton_schulz").Muon(params, adjust_lr=None, **more, **s)


def _muonium_muon(params: list[Tensor], s: Settings) -> Any:
    settings = dict(lr=s["lr"], wd=s["weight_decay"], momentum=s["momentum"])
    module = load("muonium")
    return module.Muon(params, orthogonalization_strategy="newton_schulz", **settings)


def _dion_muon(params: list[Tensor], s: Settings) -> Any:
    settings = dict(lr=s["lr"], weight_decay=s["weight_decay"], mu=s["momentum"], nesterov=True)
    return load("dion").Muon(params, adjust_lr=None, use_triton=params[0].is_cuda, **settings)


def _emerging_optimizers_muon(params: list[Tensor], s: Settings) -> Any:
    module = load("emerging_optimizers.orthogonalized_optimizers")
    return module.Muon(params, nesterov=True, coefficient_type="simple", **s)


Make = Callable[[list[Tensor], Settings], Any]
# by step: label, package, kind, maker
STEPS: dict[str, tuple[tuple[str, str, str, Make], ...]] = {
    "muon": (
        ("pytorch_optimizer Muon", "pytorch_optimizer", "package", _pytorch_optimizer_muon),
        ("gram-newton-schulz Muon", "gram_newton_schulz", "compiled", _gram_newton_schulz_muon),
        ("heavyball Muon", "heavyball", "compiled", _heavyball_muon),
        ("muonium Muon", "muonium", "compiled", _muonium_muon),
        ("dion Muon", "dion", "compiled", _dion_muon),
        ("Emerging-Optimizers Muon", "emerging_optimizers", "package", _emerging_optimizers_muon),
    ),
    "conda": (
        ("pytorch_optimizer Conda", "pytorch_optimizer", "package", _pytorch_optimizer_conda),
    ),
}
