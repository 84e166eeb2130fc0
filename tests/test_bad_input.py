"""What spectral functions, optimizers and split_params must refuse, and that nothing is written.

Every error is a ValueError or TypeError that names the op or the parameter, the rule and the value.
The ops' own table is in test_op_calls.py, that of polar in test_polar_options.py, that of
coefficients in test_coefficients_arguments.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_rows import NUMBERS, ROWS, Row, build, make, set_grads, snapshot
from orthonorm import _checks, gram_iteration, optim, power_iteration, spectral_norm
from orthonorm.optim import AdamW, Conda, Muon, split_params
from torch import nn

Bad = tuple[dict[str, Any], type[Exception], str]

# ---- spectral norms ------------------------------------------------------------------------------
W = torch.ones(4, 6)
BAD: list[Bad] = [
    (dict(W=torch.ones(5)), ValueError, "(5,)"),
    (dict(W=torch.tensor(1.0)), ValueError, "()"),
    (dict(W=W.int()), TypeError, "int32"),
    (dict(W=W.to(torch.complex64)), TypeError, "complex64"),
    (dict(W=W.to_sparse()), TypeError, "sparse"),
    (dict(W=None), TypeError, "NoneType"),
    (dict(W=3.0), TypeError, "float"),
    (dict(W="abc"), TypeError, "str"),
    (dict(W=W.numpy()), TypeError, "ndarray"),
    (dict(W={"W": W}), TypeError, "dict"),
    (dict(steps=-1), ValueError, "-1"),
    (dict(steps=1.5), TypeError, "float"),
    (dict(steps=True), TypeError, "bool"),
    (dict(steps=None), TypeError, "NoneType"),
    (dict(steps=2**70), ValueError, "steps must be below 2**63, got 1180591620717411303424"),
]  # fmt: skip
VECTORS: list[Bad] = [
    (dict(W=[W, torch.ones(5)]), ValueError, "W[1]"),
    (dict(W=[W, W.to("meta")]), ValueError, "meta"),
    (dict(u=torch.ones(5)), ValueError, "u[0] must have shape (4,), got (5,)"),
    (dict(v=torch.ones(4)), ValueError, "v[0] must have shape (6,), got (4,)"),
    (dict(u=torch.ones(4, 1)), ValueError, "(4, 1)"),
    (dict(W=torch.ones(2, 4, 6), v=torch.ones(6)), ValueError, "(2, 6)"),
    (dict(u=torch.tensor(1.0)), ValueError, "()"),
    (dict(u=torch.ones(4).int()), TypeError, "u[0] must be float32"),
    (dict(v=torch.ones(6, dtype=torch.complex64)), TypeError, "complex64"),
    (dict(v=torch.ones(6).to_sparse()), TypeError, "sparse"),
    (dict(v=torch.ones(6, device="meta")), ValueError, "meta"),
    (dict(u=[torch.ones(4)] * 2), ValueError, "'u': 2"),
    (dict(W=[W, W], u=torch.ones(4)), ValueError, "'u': 1"),
    (dict(u=3.0), TypeError, "u must be"),
    (dict(order="w_first"), ValueError, "'w_first'"),
    (dict(order=None), ValueError, "None"),
    (dict(eps=-1.0), ValueError, "-1.0"),
    (dict(eps=math.nan), ValueError, "nan"),
    (dict(eps=math.inf), ValueError, "inf"),
    (dict(eps="small"), TypeError, "str"),
]  # fmt: skip
STARTS: list[Bad] = [
    (dict(W=[W]), TypeError, "list"),
    (dict(steps=0), ValueError, "at least 1, got 0"),
    (dict(start=torch.ones(4)), ValueError, "(6,), got (4,)"),
    (dict(start=torch.ones(6).int()), TypeError, "int32"),
    (dict(start=torch.ones(6, device="meta")), ValueError, "meta"),
    (dict(start=[1.0] * 6), TypeError, "list"),
]
ALL_BAD = [
    pytest.param(f, *row, id=f"{f.__name__}-{i}")
    for f, rows in (
        (power_iteration, BAD + VECTORS),
        (spectral_norm, BAD + STARTS),
        (gram_iteration, [*BAD, STARTS[0]]),
    )
    for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("f", "change", "error", "word"), ALL_BAD)
def test_bad_arguments(
    f: Callable[..., Any], change: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error) as caught:
        f(**{"W": W, **change})
    assert str(caught.value).startswith(f.__name__)
    assert word in str(caught.value)


# ---- optimizers: arguments -----------------------------------------------------------------------
P = nn.Parameter


def pair() -> list[P]:
    return [P(torch.randn(4, 6)), P(torch.randn(5, 3))]


ONE = P(torch.ones(2, 2))
PARAMS: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "NoneType"),
    (3, TypeError, "int"),
    ([1], TypeError, "int"),
    ([], ValueError, "empty"),
    ([ONE, ONE], ValueError, "once"),
    ([{"params": [ONE]}, {"params": [ONE]}], ValueError, "more than one"),
    ([{"lr": 1.0}], ValueError, "must have params"),
    ([{"params": [ONE], "rule": "sgd"}], ValueError, "'sgd'"),
    ([{"params": [ONE], "rule": "adamw", "momentum": 0.9}], ValueError, "momentum"),
    ([P(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)], ValueError, "int32"),
    ([P(torch.ones(2, 2, dtype=torch.complex64))], ValueError, "complex64"),
    ([P(torch.eye(2).to_sparse())], ValueError, "sparse"),
    ([P(torch.ones(2, 2).to(torch.float8_e4m3fn))], ValueError, "float8"),
    ([P(torch.ones(1, 3).expand(4, 3))], ValueError, "expanded"),
    ([ONE, P(torch.ones(2, 2, device="meta"))], ValueError, "one device, got ['cpu', 'meta']"),
]  # fmt: skip
WORDS = {"ns_steps": "steps", "ns_coefficients": ""}  # named by `coefficients`, as triples or name
COMPANION: list[tuple[Any, str]] = [
    (dict(momentum=0.9), "momentum"), (dict(lr=-1), "lr"), (dict(betas=(0.9,)), "betas"),
    (dict(eps=-1), "eps"), (dict(decay_first="x"), "decay_first"),
    (dict(correct_eps=3), "correct_eps"), (dict(nonfinite="x"), "nonfinite"),
    ([1], "adamw must be a dict"), ("x", "adamw must be a dict"),
]  # fmt: skip
UNSAFE: list[tuple[dict[str, Any], str]] = [
    (dict(method="gram", precision="bfloat16"), "float16"),
    (dict(method="gram", ns_coefficients="polar_express", restarts=[]), "restarts=(2,)"),
    (dict(ns_coefficients="polar_express_raw", precision="bfloat16"), "float32"),
]
VIEWS: list[Bad] = [
    (dict(flatten="x"), ValueError, "flatten"),
    (dict(split=4), TypeError, "split"),
    (dict(split="ab"), TypeError, "split"),
    (dict(split=[4.0]), TypeError, "split"),
    (dict(split=(True, 3)), TypeError, "split"),
    (dict(split=()), ValueError, "add up to 4"),
    (dict(split=(-1, 5)), ValueError, "split"),
    (dict(split=(2, 3)), ValueError, "add up to 4"),
    (dict(heads=3), ValueError, "divide the 4 rows"),
    (dict(heads=0), ValueError, "heads"),
    (dict(heads=2.0), TypeError, "heads"),
    (dict(heads="a"), TypeError, "heads"),
    (dict(heads=True), TypeError, "heads"),
    (dict(heads=()), ValueError, "one per split piece"),
    (dict(split=(2, 2), heads=(1,)), ValueError, "one per split piece"),
]
EACH = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


@EACH
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_bad_parameters(row: Row) -> None:
    for params, error, word in PARAMS:
        with pytest.raises(error) as caught:
            build(row, params)
        assert word in str(caught.value), str(caught.value)
    opt = build(row, [ONE])
    for params, error, _ in PARAMS[-6:]:
        with pytest.raises(error):
            opt.add_param_group({"params": params})
        assert len(opt.param_groups) == 1
    if optim.REGISTRY[row.name].min_dim == 2 and row.name != "AdamW":
        for shape in ((), (3,)):
            with pytest.raises(ValueError, match=r"at least two dimensions.*rule='adamw'"):
                build(row, [P(torch.ones(shape))])


@EACH
def test_bad_hyperparameters(row: Row) -> None:
    for key, values in {**NUMBERS, **row.bad}.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)) as caught:
                build(row, pair(), **{key: value})
            assert WORDS.get(key, key) in str(caught.value), (key, value, str(caught.value))
            assert str(caught.value).split(":")[0] in (row.name, "coefficients")
            assert "must" in str(caught.value) or "use " in str(caught.value)
            with pytest.raises((ValueError, TypeError)):  # the same in a group
                build(row, [{"params": pair(), key: value}])
    with pytest.raises(TypeError, match="momentun"):
        build(row, pair(), momentun=0.9)


@pytest.mark.parametrize("optimizer", [Muon, Conda])
def test_bad_companions_views_and_combinations(optimizer: Any) -> None:
    for adamw, word in COMPANION:
        with pytest.raises((ValueError, TypeError), match=word):
            optimizer(pair(), adamw=adamw)
    for group, error, word in VIEWS:
        with pytest.raises(error, match=word):
            optimizer([{"params": [P(torch.randn(4, 6))], **group}])
    for kwargs, safe in UNSAFE if optimizer is Muon else ():
        with pytest.raises(ValueError) as caught:
            optimizer(pair(), **kwargs)
        assert safe in str(caught.value)


# ---- optimizers: what fails later leaves all as it was -------------------------------------------
def whole(opt: Any) -> list[Any]:
    """Parameters, state and counters."""
    params = [p for g in opt.param_groups for p in g["params"]]
    others = [
        {k: v for k, v in opt.state.get(p, {}).items() if not torch.is_tensor(v)} for p in params
    ]
    return [*snapshot(opt), others, [g.get("skipped") for g in opt.param_groups]]


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True)
    )


def two_groups(row: Row, steps: int, **more: Any) -> tuple[Any, list[P]]:
    params = make(torch.float32, ((6, 4), (4, 6), (5, 4), (8, 8)))
    opt = build(row, [{"params": params[:2]}, {"params": params[2:], **more}])
    for step in range(steps):
        set_grads(step, params)
        opt.step()
    set_grads(9, params)
    return opt, params


@EACH
@pytest.mark.parametrize("steps", [0, 2])
def test_a_failed_step_changes_nothing(row: Row, steps: int) -> None:
    """The second group is at fault; the first must not have moved."""
    changes = [(k, v) for k, values in {**NUMBERS, **row.bad}.items() for v in values]
    changes += [("rule", "sgd")]
    if row.name != "AdamW":
        changes += [("split", (1, 2)), ("heads", 3), ("flatten", "x")]
    for key, value in changes:
        opt, _ = two_groups(row, steps)
        opt.param_groups[1][key] = value
        before = whole(opt)
        with pytest.raises((ValueError, TypeError)):
            opt.step()
        assert equal(before, whole(opt)), (key, value)
    for grad in (torch.ones(8, 8).to_sparse(), torch.full((8, 8), math.nan)):
        opt, params = two_groups(row, steps, nonfinite="error")
        opt.param_groups[0]["nonfinite"] = "skip"
        params[0].grad[0, 0] = math.inf
        params[3].grad = grad
        before = whole(opt)
        with pytest.raises(ValueError, match=r"\(8, 8\)"):
            opt.step()
        assert equal(before, whole(opt))
    opt, _ = two_groups(row, steps)
    before = whole(opt)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert equal(before, whole(opt))


LOADED: dict[str, Callable[[torch.Tensor], Any]] = {
    "another shape": lambda t: t.new_zeros(7, 7),
    "a word": lambda t: "x",
    "nothing": lambda t: None,
    "sparse": lambda t: t.to_sparse(),
}


@EACH
@pytest.mark.parametrize("change", LOADED.values(), ids=LOADED)
def test_replaced_state_is_refused_before_anything_is_written(
    row: Row, change: Callable[[Any], Any]
) -> None:
    """By hand, after steps that went well, in the last parameter of the second group."""
    opt, params = two_groups(row, 2)
    state, before = opt.state[params[3]], copy.deepcopy(params)
    for key in [k for k, v in state.items() if torch.is_tensor(v) and v.dim()]:
        good, state[key] = state[key], change(state[key])
        watched = [*params, *(v for p in params[:3] for v in opt.state[p].values())]
        before = copy.deepcopy(watched)
        with pytest.raises((ValueError, TypeError), match=f"{row.name}.*{key}"):
            opt.step()
        assert equal(watched, before)
        state[key] = good
    opt.step()
    assert not torch.equal(params[0], before[0])


def test_a_refresh_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step, and at the second refresh; for the last matrix of the second group."""
    eigh, calls = torch.linalg.eigh, []

    def failing(A: torch.Tensor) -> Any:
        calls.append(A)
        if len(calls) == 4:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(A)

    row = next(row for row in ROWS if row.name == "Conda")
    for steps in (0, row.kwargs["update_proj_gap"]):
        opt, _ = two_groups(row, steps)
        before = whole(opt)
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(torch.linalg.LinAlgError):
            patch.setattr(torch.linalg, "eigh", failing)
            opt.step()
        assert len(calls) == 4 and equal(before, whole(opt))
        opt.step()
        assert not equal(before, whole(opt))


@EACH
@pytest.mark.parametrize("change", LOADED.values(), ids=LOADED)
def test_state_that_does_not_fit_is_not_loaded(row: Row, change: Callable[[Any], Any]) -> None:
    opt, params = two_groups(row, 2)
    before = whole(opt)
    for key in [k for k, v in opt.state[params[3]].items() if torch.is_tensor(v) and v.dim()]:
        bad = copy.deepcopy(opt.state_dict())
        bad["state"][3][key] = change(bad["state"][3][key])
        with pytest.raises((ValueError, TypeError), match=f"{row.name}.*{key}"):
            opt.load_state_dict(bad)
        assert equal(before, whole(opt))
        if len(bad["state"][3]) > 1:
            del bad["state"][3][key]
            with pytest.raises(ValueError, match=f"state must have .*{key}"):
                opt.load_state_dict(bad)
    bad = copy.deepcopy(opt.state_dict())
    bad["param_groups"][0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must"):
        opt.load_state_dict(bad)
    assert equal(before, whole(opt)) and opt.param_groups[0]["lr"] > 0
    opt.step()


def test_conda_refuses_the_state_of_adamw() -> None:
    """Its momentum is not rotated, and there is no basis: updates would be zero until a refresh."""
    params = pair()
    adamw = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    adamw.step()
    with pytest.raises(ValueError, match=r"state must have .*basis"):
        Conda(params).load_state_dict(adamw.state_dict())
    AdamW(params).load_state_dict(adamw.state_dict())


# ---- split_params --------------------------------------------------------------------------------
MODEL = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
PATTERNS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(model=None), TypeError, "NoneType"),
    (dict(model=MODEL.parameters()), TypeError, "generator"),
    (dict(adamw="lm_head"), TypeError, "adamw must be a list of patterns, got 'lm_head'"),
    (dict(adamw=None), TypeError, "adamw must be"),
    (dict(adamw=[1]), TypeError, "adamw must be"),
    (dict(heads=4), TypeError, "heads must be a dict"),
    (dict(split=[("0.weight", (3, 3))]), TypeError, "split must be a dict"),
    (dict(heads={"nothing": 2}), ValueError, "'nothing'"),
    (dict(heads={3: 2}), ValueError, "3"),
    (dict(heads={"0.weight": "x"}), TypeError, "'x'"),
    (dict(heads={"0.weight": None}), TypeError, "None"),
    (dict(heads={"0.weight": 0}), ValueError, "got 0"),
    (dict(heads={"0.weight": True}), TypeError, "bool"),
    (dict(split={"0.weight": 2}), TypeError, "split must be"),
    (dict(split={"0.weight": (2.0, 4)}), TypeError, "float"),
]


@pytest.mark.parametrize(("change", "error", "word"), PATTERNS, ids=lambda v: str(v)[:30])
def test_bad_patterns(change: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error) as caught:
        split_params(**{"model": MODEL, **change})
    assert word in str(caught.value) and str(caught.value).startswith("split_params")


def test_a_rate_on_no_device_is_refused_by_where_it_may_be() -> None:
    rate = torch.ones((), device="meta")
    with pytest.raises(ValueError, match="op: lr must be on cpu, got meta"):
        _checks.scalar("op", "lr", rate, [W])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "beta2 must be below 1 with variant='study', got 1.0"),
        (dict(beta2=0.99), "precondition_frequency must be larger .* grow by 1e70, got 1"),
        (dict(beta2=0.999, precondition_frequency=10), "grow by 1e73, got 10"),
        (
            dict(beta2=0.9, precondition_frequency=10, momentum=1.0),
            "momentum must be below 1 with variant='study', got 1.0",
        ),
    ],
)
def test_shampoo_of_the_study_needs_averages_that_stay_finite(
    settings: dict[str, Any], message: str
) -> None:
    """It became NaN: at once, or once its Gram matrices had overflowed."""
    with pytest.raises(ValueError, match=f"Shampoo: .*{message}"):
        optim.Shampoo([P(torch.ones(3, 2))], variant="study", **settings)
