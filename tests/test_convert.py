"""State dicts of other libraries: a run that changes to the optimizer here goes on as it was.

The other optimizers are their recursions, in float64 by the transcriptions of the other tests.
"""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_rows import make, set_grads
from oracle_muon import normuon, shape_factor
from oracle_relatives import dion, dion2
from oracles import Array, Oracle, State, newton_schulz
from orthonorm import optim
from torch import Tensor, nn
from trusted import TrustedConda

SHAPES = ((12, 7), (7, 12), (12, 7), (9, 9))
FULL = dict(precision="full")


def heavy(adjust: str) -> Callable[..., Array]:
    """Muon with momentum B <- mu B + G, as Moonlight and microsoft/dion have it."""

    def rule(W: Array, G: Array, s: State, t: int) -> Array:
        B = s["B"] = 0.95 * s.get("B", 0.0) + G
        X = newton_schulz(0.95 * B + G) * shape_factor(adjust, *W.shape)
        return 0.9995 * W - 0.005 * X

    return rule


def lerped(W: Array, G: Array, s: State, t: int) -> Array:
    B = s["B"] = 0.95 * s.get("B", 0.0) + 0.05 * G
    X = newton_schulz(0.95 * B + 0.05 * G) * shape_factor("original", *W.shape)
    return 0.9995 * W - 0.005 * X


def adam(corrected: bool) -> Callable[..., Array]:
    def rule(W: Array, G: Array, s: State, t: int) -> Array:
        s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * G
        s["v"] = 0.95 * s.get("v", 0.0) + 0.05 * G * G
        c1, c2 = 1 - 0.9**t, (1 - 0.95**t) ** 0.5
        root = np.sqrt(s["v"]) / c2 + 1e-3 if corrected else (np.sqrt(s["v"]) + 1e-3) / c2
        return 0.9995 * W - 0.005 * s["m"] / c1 / root

    return rule


def tensors(s: State, names: dict[str, str]) -> dict[str, Any]:
    return {theirs: torch.from_numpy(np.array(s[key])) for key, theirs in names.items()}


def two_groups(
    a: Oracle, b: Oracle, states: Any, matrix: dict[str, Any], rest: dict[str, Any]
) -> Any:
    """A state dict of a matrix group and an AdamW group."""
    count = len(a.params)
    groups = [
        {**matrix, "params": list(range(count))},
        {**rest, "params": list(range(count, count + len(b.params)))},
    ]
    both = [*((s, True, a.t) for s in a.state), *((s, False, b.t) for s in b.state)]
    return {"state": {i: states(*x) for i, x in enumerate(both)}, "param_groups": groups}


def keller(a: Oracle, b: Oracle) -> Any:
    def states(s: State, matrix: bool, t: int) -> Any:
        if matrix:
            return tensors(s, {"B": "momentum_buffer"})
        return {**tensors(s, {"m": "exp_avg", "v": "exp_avg_sq"}), "step": t}

    muon = dict(lr=0.005, momentum=0.95, weight_decay=0.1, use_muon=True)
    rest = dict(lr=0.005, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1, use_muon=False)
    return two_groups(a, b, states, muon, rest)


def moonlight(a: Oracle, b: Oracle) -> Any:
    def states(s: State, matrix: bool, t: int) -> Any:
        if matrix:
            return {"use_muon": True, **tensors(s, {"B": "momentum_buffer"})}
        return {"use_muon": False, "step": t, **tensors(s, {"m": "moment1", "v": "moment2"})}

    group = dict(lr=0.005, wd=0.1, momentum=0.95, nesterov=True, ns_steps=5,
                 adamw_betas=(0.9, 0.95), adamw_eps=1e-3)  # fmt: skip
    saved = two_groups(a, b, states, group, group)
    ids = [i for g in saved["param_groups"] for i in g["params"]]
    return {**saved, "param_groups": [{**group, "params": ids}]}


def microsoft(algorithm: str, names: dict[str, str], **more: Any) -> Callable[..., Any]:
    def saved(a: Oracle, b: Oracle) -> Any:
        def states(s: State, matrix: bool, t: int) -> Any:
            if not matrix:
                return tensors(s, {"m": "momentum", "v": "variance"})
            found = tensors(s, names)
            if "variance_neuron" in found:
                found["variance_neuron"] = found["variance_neuron"].reshape(-1, 1)
            return found

        common = dict(lr=0.005, beta1=0.9, beta2=0.95, weight_decay=0.1, epsilon=1e-3, step=a.t,
                      flatten=False, adjust_lr="rms_norm", **more)  # fmt: skip
        rest = dict(common, algorithm="adamw")
        return two_groups(a, b, states, dict(common, algorithm=algorithm), rest)

    return saved


def with_heavy_momentum(W: Array, G: Array, s: State, t: int) -> Array:
    """microsoft/dion's NorMuon: ours of a momentum that is 1 / (1-mu) times as long."""
    s["B"] = s.get("H", 0.0) * 0.05
    new = normuon(W, G, s, t, lr=0.005, weight_decay=0.1, eps=1e-8)
    s["H"] = s["B"] / 0.05
    return new


def rule(f: Callable[..., Array], **kwargs: Any) -> Callable[..., Array]:
    return lambda W, G, s, t: f(W, G, s, t, lr=0.005, weight_decay=0.1, **kwargs)


MUON = dict(mu=0.95, nesterov=True)
CASES: dict[str, Any] = {  # layout, class, its recursion, the companion's, the saved dict
    "keller": ("keller", "Muon", FULL, lerped, adam(True), keller),
    "moonlight": ("moonlight", "Muon", FULL, heavy("match_rms_adamw"), adam(False), moonlight),
    "dion's Muon": ("dion", "Muon", FULL, heavy("match_rms_adamw"), adam(True),
                    microsoft("muon", {"B": "momentum"}, **MUON)),
    "dion's NorMuon": (
        "dion", "NorMuon", FULL, with_heavy_momentum, adam(True),
        lambda a, b: original(microsoft("normuon", {"H": "momentum", "v": "variance_neuron"},
                                        muon_beta2=0.95, **MUON)(a, b)),
    ),
    "Dion2": ("dion", "Dion2", FULL, rule(dion2), adam(True), lambda a, b: spectral(
        microsoft("dion2", {"M": "momentum"}, ef_decay=0.95, fraction=0.25)(a, b))),
    "NorDion2": ("dion", "Dion2", dict(FULL, beta2=0.9), rule(dion2, beta2=0.9), adam(True),
                 lambda a, b: spectral(microsoft(
                     "nordion2", {"M": "momentum", "v": "variance_neuron"}, mu=0.95,
                     fraction=0.25, muon_beta2=0.9)(a, b))),
    "Dion": ("dion", "Dion", {}, rule(dion), adam(True), lambda a, b: spectral(
        microsoft("dion", {"M": "momentum", "Q": "Q"}, mu=0.95, rank_fraction=1.0)(a, b))),
}  # fmt: skip


def spectral(saved: Any) -> Any:
    for group in saved["param_groups"]:
        group["adjust_lr"] = "spectral_norm"
    return saved


def original(saved: Any) -> Any:
    """The transcription of NorMuon has Keller Jordan's factor, which dion lacks."""
    for group in saved["param_groups"]:
        del group["adjust_lr"]
    return saved


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on(case: str, tmp_path: Path) -> None:
    layout, name, kwargs, matrix, rest, save = CASES[case]
    shapes = (*SHAPES, (5,))
    theirs, ours = make(torch.float64, shapes), make(torch.float64, shapes)
    a, b = Oracle(theirs[:-1], matrix), Oracle(theirs[-1:], rest)
    for step in range(3):
        set_grads(step, theirs)
        a.step()
        b.step()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    groups = [  # in other groups and another order
        {"params": [ours[-1]], "rule": "adamw"},
        {"params": [ours[2], ours[0]]},
        {"params": [ours[3], ours[1]]},
    ]
    opt = optim.REGISTRY[name](groups, **kwargs)
    torch.save(save(a, b), tmp_path / "saved.pt")
    opt.load_state_dict(optim.convert_state_dict(tmp_path / "saved.pt", layout, opt, ours))
    for step in range(3, 7):
        set_grads(step, theirs, ours)
        for o in (a, b, opt):
            o.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-11, rtol=1e-11)


class CondaProjector:
    """What the authors' states hold; a file names their module."""

    def __init__(self, ortho_matrix: Tensor) -> None:
        self.ortho_matrix, self.proj_type, self.update_proj_gap = ortho_matrix, "std", 3


def test_conda_goes_on_from_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    theirs, ours = make(torch.float64, SHAPES), make(torch.float64, SHAPES)
    reference = TrustedConda(theirs, 0.01, (0.9, 0.99), update_proj_gap=3, weight_decay=0.1)
    for step in range(5):
        set_grads(step, theirs)
        reference.step()
    state = {}
    for i, (p, M, v, Q) in enumerate(
        zip(theirs, reference.M, reference.v, reference.Q, strict=True)
    ):
        Q = Q.mT.clone() if p.shape[0] >= p.shape[1] else Q  # theirs is V^T or U
        projector = CondaProjector(Q)
        state[i] = dict(step=reference.s, exp_avg=M, exp_avg_sq=v, projector=projector)
    group = dict(settings, correct_bias=True, update_proj_gap=3, scale=0.25, proj_type="std",
                 params=[0, 1, 2, 3])  # fmt: skip
    module = types.ModuleType("conda_torch.projector")
    module.CondaProjector = CondaProjector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "conda_torch", types.ModuleType("conda_torch"))
    monkeypatch.setitem(sys.modules, "conda_torch.projector", module)
    monkeypatch.setattr(CondaProjector, "__module__", "conda_torch.projector")
    file = io.BytesIO()
    torch.save({"state": state, "param_groups": [group]}, file)
    file.seek(0)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    opt = optim.Conda(ours)
    saved = optim.convert.read(file)
    opt.load_state_dict(optim.convert_state_dict(saved, "conda", opt, ours))
    for step in range(5, 9):
        set_grads(step, theirs, ours)
        reference.step()
        opt.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-11, rtol=1e-11)


def test_sorted_matrices_find_their_parameters() -> None:
    """MuonWithAuxAdam numbers a group's matrices by descending shape."""
    params = make(torch.float32, ((7, 12), (12, 7), (7, 12)))
    order = [params[1], params[0], params[2]]
    state = {i: {"momentum_buffer": torch.full_like(p, float(i))} for i, p in enumerate(order)}
    group = dict(lr=0.1, momentum=0.9, weight_decay=0.0, use_muon=True, params=[0, 1, 2])
    opt = optim.Muon(params)
    given = [{"params": params, "use_muon": True}]
    saved = {"state": state, "param_groups": [group]}
    opt.load_state_dict(optim.convert_state_dict(saved, "keller_sorted", opt, given))
    assert [opt.state[p]["momentum_buffer"][0, 0].item() for p in params] == [1.0, 0.0, 2.0]
    assert opt.param_groups[0]["momentum"] == 0.9


def test_what_does_not_fit_is_refused() -> None:
    params = make(torch.float64, ((12, 7), (7, 12)))
    opt = optim.Muon(params)
    group = dict(lr=0.1, momentum=0.9, weight_decay=0.0)
    groups = [{**group, "params": [0]}, {**group, "lr": 0.2, "params": [1]}]
    saved: dict[str, Any] = {"state": {}, "param_groups": groups}
    convert = optim.convert_state_dict
    with pytest.raises(ValueError, match=r"one lr, got 0\.2 beside 0\.1"):
        convert(saved, "keller", opt, params)
    with pytest.raises(ValueError, match="params must be those"):
        convert(saved, "keller", opt, params[:1])
    with pytest.raises(ValueError, match="'nobody'"):
        convert(saved, "nobody", opt, params)
    with pytest.raises(ValueError, match="among params"):
        convert(saved, "keller", opt, [params[0], nn.Parameter(torch.ones(2, 2))])
    same = {"state": {0: {"momentum_buffer": torch.ones(12, 7)}}, "param_groups": [
        {**group, "params": [0, 1]}]}  # fmt: skip
    with pytest.raises(ValueError, match="NorMuon has the state"):
        convert(same, "keller", optim.NorMuon(params), params)
    with pytest.raises(ValueError, match="rule='matrix'"):
        convert(same, "keller", optim.AdamW(params), params)
    same["state"] = {}  # as settings alone would be
    with pytest.raises(ValueError, match="rule='matrix'"):
        convert(same, "keller", optim.AdamW(params), params)
    scheduled = [{**group, "initial_lr": 0.1, "params": [0]}, {**group, "params": [1]}]
    with pytest.raises(ValueError, match=r"one initial_lr, got None beside 0\.1"):
        convert({"state": {}, "param_groups": scheduled}, "keller", opt, params)
    with pytest.raises(ValueError, match="algorithm"):
        lion = [{"algorithm": "lion", "step": 1, "params": [0, 1]}]
        convert({"state": {}, "param_groups": lion}, "dion", opt, params)


@pytest.mark.parametrize("saved", [{}, None, {"state": {}}])
def test_what_is_no_state_dict_is_refused(saved):
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match="saved must be a dict of 'state' and 'param_groups', got"):
        optim.convert_state_dict(saved, "keller", optim.Muon([p], lr=0.1), [p])


def test_what_is_no_matrix_optimizer_is_refused():
    p = torch.nn.Parameter(torch.ones(2, 2))
    other = torch.optim.SGD([p])
    with pytest.raises(TypeError, match="optimizer must be a MatrixOptimizer, got SGD"):
        optim.convert_state_dict(other.state_dict(), "keller", other, [p])
