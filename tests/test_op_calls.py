"""Every op under torch.compile and opcheck, and every op given what it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from orthonorm.bench.cases import CASES, Case, as_list, tensors
from orthonorm.bench.inputs import Arguments, Inputs, copied, map_tensors
from orthonorm.bench.shapes import Workload
from test_ops import ALL, EACH, LIST, made, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend


# ---- torch.compile and opcheck -------------------------------------------------------------------
@EACH
def test_opcheck(case: Case) -> None:
    arguments = made(case, ((5, 9), (2, 7, 4)), Inputs())
    if not case.mutated and not case.takes_list:
        first = next(iter(tensors(arguments)))
        arguments[first].requires_grad_(case.name in ("spectral_norm", "gram_iteration"))
    torch.library.opcheck(case.op.overload, (), arguments)


def compiled(case: Case) -> tuple[Any, Any]:
    """The op compiled for any shapes, and what counts the graphs (twice where a float is traced:
    AOTAutograd then starts over), so tests compare counts after the first call and the last."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    op = case.op

    def call(arguments: Arguments) -> Any:
        return op(**arguments)

    return torch.compile(call, fullgraph=True, dynamic=True, backend=counter), counter


@EACH
def test_compile_two_shapes_one_graph(case: Case) -> None:
    f, counter = compiled(case)
    graphs = 0
    for m, n in ((13, 29), (17, 31)):
        arguments = made(case, ((m, n), (n, m)), Inputs())
        want = run(case, case.op, copied(arguments))
        got = run(case, lambda **a: f(a), arguments)
        for name, values in want.items():
            for a, b in zip(got[name], values, strict=True):
                assert torch.equal(a, b), name
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


SCHEDULED = [c for c in ALL if {"lr", "momentum"} & {a.name for a in c.schema.arguments}]


@pytest.mark.parametrize("case", SCHEDULED, ids=lambda c: c.name)
def test_ten_rates_one_graph(case: Case) -> None:
    f, counter = compiled(case)
    arguments = made(case, ((5, 9),), Inputs())
    graphs = 0
    for i in range(10):
        for name in ("lr", "momentum"):
            if name in arguments:
                arguments[name] = torch.tensor(0.01 * (i + 1))
        f(arguments)
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


# ---- bad input -----------------------------------------------------------------------------------
def _entry(value: Any, change: Any) -> Any:
    """`change` on a tensor, or on the last entry of a list."""
    return change(value) if isinstance(value, Tensor) else [*value[:-1], change(value[-1])]


CHANGES: dict[str, tuple[Any, type[Exception]]] = {
    "integers": (lambda t: torch.ones(t.shape, dtype=torch.int32), TypeError),
    "complex": (lambda t: t.to(torch.complex64), TypeError),
    "sparse": (lambda t: t.clone().to_sparse(), TypeError),
    "a number": (lambda t: 3.0, TypeError),
    "None": (lambda t: None, TypeError),
    "a longer side": (lambda t: t.new_zeros(*t.shape[:-1], t.shape[-1] + 1), ValueError),
    "rank 1": (lambda t: t.new_zeros(5), ValueError),
    "another device": (lambda t: t.to("meta"), ValueError),
}
LONE = ("gram", "gram_polynomial", "direct_polynomial", "gram_form", "row_normalize",
        "column_normalize", "spectral_norm", "gram_iteration", "magnitude", "small_newton_schulz",
        "newton_schulz", "newton_schulz_", "scaled_polynomial_", "polar_iteration",
        "sign_")  # fmt: skip
FREE_RANK = ("rotated_adam_", "decayed_update_", "adamw_step_", "sign_")
# any number of columns goes with B, with a Gram matrix, one moment per row, one number per matrix
WIDER = (("apply", "X"), ("gram_update_", "X"), ("row_moment_", "X"), ("divide_each", "X"),
         ("mean_sinh_square", "X"))  # fmt: skip
KEYWORDS: dict[str, list[Any]] = {
    "beta1": [-0.1, 1.0, "x"],
    "beta2": [1.5, float("nan")],
    "eps": [-1.0, float("nan"), None],
    "eps_at": ["around"],
    "scale": [-1.0],
    "steps": [-1, 1.5],
    "order": ["w_first"],
    "coefficients": [[], [1.0, 2.0], [float("nan"), 0.0, 0.0]],
    "restarts": [[0], [9]],
    "form": ["triangle"],
    "precision": ["float8"],
    "safety": [0.5],
    "lr": [0.1],
    "momentum": [0.9],
    "weight_decay": [0.1],
    "dtype": [torch.int32],
    "alpha": ["x"],
    "a": ["x"],
}


def refused(case: Case, arguments: Arguments, error: type[Exception], word: str) -> None:
    """The call raises `error`, names op and argument, and has written nothing."""
    named = {k: v for k, v in arguments.items() if k in case.mutated}
    before = map_tensors(named, lambda t: t.clone() if t.layout == torch.strided else t)
    with pytest.raises(error) as caught:
        case.op(**arguments)
    assert case.name in str(caught.value)
    assert word in str(caught.value), f"{word} not in: {caught.value}"
    for name, values in named.items():
        for a, b in zip(as_list(values), as_list(before[name]), strict=True):
            if isinstance(a, Tensor) and a.layout == torch.strided and a.device.type == "cpu":
                assert torch.equal(a, b), name


def applies(case: Case, name: str, change: str, value: Any) -> bool:
    """Whether this change of this argument is an error."""
    first = value if isinstance(value, Tensor) else value[0]
    scheduled = first.dim() == 0
    if change == "None":
        return name not in ("scales", "corrections", "norms", "decay")
    if change == "rank 1":
        return not scheduled and first.dim() >= 2 and case.name not in FREE_RANK
    if change == "a longer side" and (case.name, name) in WIDER:
        return False
    if change in ("a longer side", "another device"):
        return not scheduled and case.name not in LONE
    return True


BAD = [pytest.param(case, change, id=f"{case.name}-{change}") for case in ALL for change in CHANGES]


@pytest.mark.parametrize(("case", "change"), BAD)
def test_bad_tensor(case: Case, change: str) -> None:
    f, error = CHANGES[change]
    for name in tensors(made(case, LIST[:2], Inputs())):
        arguments = made(case, LIST[:2], Inputs())
        if applies(case, name, change, arguments[name]):
            arguments[name] = _entry(arguments[name], f)
            refused(case, arguments, error, "" if error is ValueError else name)


@pytest.mark.parametrize("case", [c for c in ALL if c.takes_list], ids=lambda c: c.name)
def test_bad_list(case: Case) -> None:
    """Something that is no list, and lists of unequal lengths."""
    names = [n for n, v in made(case, LIST[:2], Inputs()).items() if isinstance(v, list)]
    for name in names:
        arguments = made(case, LIST[:2], Inputs())
        if any(isinstance(e, Tensor) for e in arguments[name]):
            refused(case, {**arguments, name: arguments[name][0]}, TypeError, name)
        if case.name not in LONE and name not in ("coefficients", "restarts"):
            refused(case, {**arguments, name: arguments[name][:1]}, ValueError, name)
            refused(case, {**arguments, name: arguments[name] * 2}, ValueError, name)


@EACH
def test_bad_keyword(case: Case) -> None:
    names = {a.name for a in case.schema.arguments}
    for name, values in KEYWORDS.items():
        for value in values if name in names else ():
            arguments = {**made(case, LIST[:2], Inputs()), name: value}
            if case.name == "newton_schulz" and name == "scale":
                arguments["scale"] = "spectral"
            if isinstance(arguments.get("steps"), list) and name == "steps":
                continue  # adamw_step_'s counters
            if case.name == "small_newton_schulz" and name == "scale":
                continue  # a flag
            refused(case, arguments, (ValueError, TypeError), name)  # type: ignore[arg-type]


def test_small_newton_schulz_refuses_large_sides() -> None:
    case = CASES["small_newton_schulz"]
    (arguments,) = case.calls(Workload("", ((4, 4),)), Inputs())
    arguments["X"].append(torch.zeros(128, 129))
    refused(case, arguments, ValueError, "129")
