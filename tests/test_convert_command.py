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
