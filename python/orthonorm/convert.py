"""`python -m orthonorm convert IN OUT --from keller --to muon`: convert another library's state.

The file is loaded with weights_only=True. The result loads into an optimizer with the groups of the
file, where a group that has both matrices and AdamW's parameters is split in two.
"""

from __future__ import annotations

import argparse
import ast
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .optim import MatrixOptimizer
from .optim.configure import by_name
from .optim.convert import LAYOUTS, convert_state_dict, read

SHAPED = ("momentum_buffer", "exp_avg", "momentum", "moment1")  # states shaped as the parameter
# keller_sorted cannot be converted here: the file does not tell the model's order of matrices
FROM = [name for name in LAYOUTS if name != "keller_sorted"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(
        prog="python -m orthonorm convert",
        description="Convert the state dict of another library's optimizer, without its model.",
        epilog="Group by group, the parameters of OUT are those of IN: first a group's matrices, "
        "then what AdamW updates, as a group of its own. MuonWithAuxAdam of KellerJordan/Muon "
        "sorts its matrices, in an order that only the model tells: see convert_state_dict.",
    )
    out.add_argument("input", metavar="IN", type=Path, help="torch.save of a state dict")
    out.add_argument("output", metavar="OUT", type=Path, help="must not exist")
    out.add_argument("--from", dest="layout", required=True, choices=FROM)
    out.add_argument(
        "--to", required=True, help="an optimizer of orthonorm.optim: muon, conda, ..."
    )
    out.add_argument("--key", help="where the state dict is in IN; the rest is kept as it is")
    out.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE",
        help="of the optimizer, where the file has none; repeatable",
    )  # fmt: skip
    return out


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """Return {name: value} of words NAME=VALUE; a value is a Python literal or else a string."""
    settings = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set must be NAME=VALUE, got {word!r}")
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = text
    return settings


def parameters(saved: Mapping[str, Any]) -> dict[int, Tensor]:
    """Return an empty parameter for each index of the file, shaped as its state.

    Raise ValueError for an index without state of its shape.
    """
    params: dict[int, Tensor] = {}
    for index in (i for group in saved["param_groups"] for i in group["params"]):
        state = saved["state"].get(index, {})
        like = next((state[k] for k in SHAPED if isinstance(state.get(k), Tensor)), None)
        if like is None:
            raise ValueError(
                f"parameter {index} must have state that tells its shape, got {sorted(state)}: "
                "with the model, orthonorm.optim.convert_state_dict converts it"
            )
        params[index] = nn.Parameter(torch.empty_like(like, device="cpu"))
    return params


def optimizer_of(
    saved: Mapping[str, Any], layout: str, cls: type[MatrixOptimizer], settings: dict[str, Any]
) -> tuple[MatrixOptimizer, list[Tensor]]:
    """Return the optimizer that will load the result, and the parameters in the file's order."""
    params = parameters(saved)
    groups: list[dict[str, Any]] = []
    for group in saved["param_groups"]:
        rules: dict[str, list[Tensor]] = {"matrix": [], "adamw": []}
        for i in group["params"]:
            rules[LAYOUTS[layout](saved["state"][i], group, params[i])[0]].append(params[i])
        groups += [{"params": some, "rule": rule} for rule, some in rules.items() if some]
    return cls(groups, **settings), list(params.values())


def converted(
    saved: Any, layout: str, cls: type[MatrixOptimizer], settings: dict[str, Any]
) -> tuple[dict[str, Any], MatrixOptimizer]:
    """Convert a state dict; return the result and an optimizer that has loaded it."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        got = sorted(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(
            f"the state dict must have 'state' and 'param_groups' (--key says where), got {got}"
        )
    try:
        optimizer, params = optimizer_of(saved, layout, cls, settings)
        result = convert_state_dict(saved, layout, optimizer, params)
    except (KeyError, AttributeError) as error:
        raise ValueError(f"the state dict must have the layout of {layout}: no {error}") from error
    optimizer.load_state_dict(result)
    return result, optimizer


def run(args: argparse.Namespace) -> str:
    """Convert the file and return the line to print; OUT appears only when it is complete."""
    if args.output.exists():
        raise ValueError(f"OUT must not exist, got {args.output}")
    cls, settings = by_name(args.to), settings_of(args.settings)
    loaded = read(args.input)
    if args.key is None:
        result, optimizer = converted(loaded, args.layout, cls, settings)
        whole: Any = result
    else:
        if not isinstance(loaded, dict) or args.key not in loaded:
            raise ValueError(f"--key must be in the file, got {args.key!r}")
        result, optimizer = converted(loaded[args.key], args.layout, cls, settings)
        whole = {**loaded, args.key: result}
    part = args.output.with_name(f"{args.output.name}.part")
    try:
        torch.save(whole, part)
        os.replace(part, args.output)
    finally:
        part.unlink(missing_ok=True)
    groups = ", ".join(f"{len(g['params'])} by {g['rule']}" for g in optimizer.param_groups)
    return f"wrote {args.output}: {optimizer.name}, groups of {groups}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        print(run(args))
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        line = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        print(f"orthonorm convert: {line}", file=sys.stderr)
        return 2
    return 0
