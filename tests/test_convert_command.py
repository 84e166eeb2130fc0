"""`python -m orthonorm convert`: what convert_state_dict gives with the model, by a file alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_rows import make, set_grads
from oracles import Oracle
from orthonorm import optim
from orthonorm.__main__ import main
from test_convert import CASES, SHAPES


def saved_by(case: str) -> tuple[dict[str, Any], list[Any]]:
    """A state dict of three steps, and the parameters."""
    _, _, _, matrix, rest, save = CASES[case]
    params = make(torch.float64, (*SHAPES, (5,)))
    a, b = Oracle(params[:-1], matrix), Oracle(params[-1:], rest)
    for step in range(3):
        set_grads(step, params)
        a.step()
        b.step()
    return save(a, b), params


@pytest.mark.parametrize("case", CASES)
def test_files_convert_as_with_the_model(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, name, kwargs, *_ = CASES[case]
    saved, params = saved_by(case)
    torch.save({"optimizer": saved, "step": 3}, tmp_path / "in.pt")
    words = ["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--from", layout,
             "--to", name.lower(), "--key", "optimizer"]  # fmt: skip
    assert main([*words, *(f"--set={key}={value}" for key, value in kwargs.items())]) == 0
    assert f"{name}, groups of 4 by matrix, 1 by adamw" in capsys.readouterr().out
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    groups = [{"params": params[:-1]}, {"params": params[-1:], "rule": "adamw"}]
    opt = optim.REGISTRY[name](groups, **kwargs)
    wanted = optim.convert_state_dict(saved, layout, opt, params)
    assert found["step"] == 3 and found["optimizer"]["param_groups"] == wanted["param_groups"]
    torch.testing.assert_close(found["optimizer"]["state"], wanted["state"], rtol=0, atol=0)
    opt.load_state_dict(found["optimizer"])


def test_parameters_that_change_places_keep_their_state(tmp_path: Path) -> None:
    """Matrices and AdamW's parameters in turn, in two groups: each group is cut in two."""
    params = make(torch.float32, ((5,), (4, 3), (3,), (3, 4), (2, 2), (6,)))
    group = dict(lr=0.1, wd=0.0, momentum=0.9, nesterov=True, ns_steps=5,
                 adamw_betas=(0.9, 0.95), adamw_eps=1e-8)  # fmt: skip
    state: dict[int, Any] = {}
    for i, p in enumerate(params):
        here = torch.full_like(p, float(i))
        state[i] = (
            {"use_muon": True, "momentum_buffer": here} if p.dim() == 2
            else {"use_muon": False, "step": i, "moment1": here, "moment2": here}
        )  # fmt: skip
    groups = [{**group, "params": [0, 1, 2, 3]}, {**group, "lr": 0.2, "params": [4, 5]}]
    torch.save({"state": state, "param_groups": groups}, tmp_path / "in.pt")
    paths = [str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    assert main(["convert", *paths, "--from", "moonlight", "--to", "muon"]) == 0
    ways = (("matrix", (1, 3)), ("adamw", (0, 2)), ("matrix", (4,)), ("adamw", (5,)))
    opt = optim.Muon([dict(params=[params[i] for i in some], rule=rule) for rule, some in ways])
    opt.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.1, 0.2, 0.2]
    for i, p in enumerate(params):
        if p.dim() == 2:  # ours is (1 - mu) of a momentum B <- mu B + G
            wanted = torch.full_like(p, i * (1 - 0.9))
            torch.testing.assert_close(opt.state[p]["momentum_buffer"], wanted)
        else:
            assert opt.state[p]["step"] == i
            assert all(torch.equal(opt.state[p][k], torch.full_like(p, float(i)))
                       for k in ("exp_avg", "exp_avg_sq"))  # fmt: skip


def test_what_is_not_written_whole_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(saved_by("keller")[0], tmp_path / "in.pt")
    written = []

    def full(value: Any, path: Path) -> None:
        written.append(path.name)
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    paths = [str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    assert main(["convert", *paths, "--from", "keller", "--to", "muon"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert written == ["out.pt.part"] and [p.name for p in tmp_path.iterdir()] == ["in.pt"]


class Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("true",)


def without_state(saved: dict[str, Any]) -> dict[str, Any]:
    return {**saved, "state": {i: s for i, s in saved["state"].items() if i != 2}}


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str], str]] = {
    "no file": (lambda s: None, [], "No such file"),
    "code in the file": (lambda s: {**s, "more": Code()}, [], "eights only load failed"),
    "no state dict": (lambda s: {"optimizer": s}, [], "must have 'state' and 'param_groups'"),
    "no such key": (lambda s: s, ["--key", "optimizer"], "--key must be in the file"),
    "another layout": (lambda s: s, ["--from", "moonlight"], "must have the layout of moonlight"),
    "another rule": (lambda s: s, ["--to", "conda"], "Conda has the state"),
    "no such optimizer": (lambda s: s, ["--to", "moon"], "optimizer must be one of"),
    "no such setting": (lambda s: s, ["--set", "spin=1"], "spin"),
    "no setting": (lambda s: s, ["--set", "spin"], "--set must be NAME=VALUE, got 'spin'"),
    "a bad setting": (lambda s: s, ["--set", "eps=-1"], "eps must be"),
    "no shape": (without_state, [], "parameter 2 must have state that tells its shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words, message = BAD[case]
    saved = change(saved_by("keller")[0])
    if saved is not None:
        torch.save(saved, tmp_path / "in.pt")
    paths = [str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    assert main(["convert", *paths, "--from", "keller", "--to", "muon", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("orthonorm convert: ") and error.count("\n") == 1, error
    assert message in error, error
    assert {p.name for p in tmp_path.iterdir()} <= {"in.pt"}


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(saved_by("keller")[0], tmp_path / "in.pt")
    path = str(tmp_path / "in.pt")
    assert main(["convert", path, path, "--from", "keller", "--to", "muon"]) == 2
    assert "OUT must not exist" in capsys.readouterr().err
