"""torch.compile(fullgraph=True): optimizer steps and public functions in one graph, eager's bits.

Ops alone are compiled in test_op_calls.py. The backend is aot_eager, which traces as Inductor does.
The counter sees a graph twice where AOTAutograd starts over to make a number a tensor, so counts
are compared: once a step has been traced with its state, no rate, weight decay or shape may add a
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orthonorm
import pytest
import torch
from optimizer_rows import ROWS, Row, build, make, set_grads, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

SHAPES = ((24, 10), (3, 9, 14), (150, 140))
WARM_UP = (
    3  # steps: state is made, numbers become dynamic, Conda's refresh and its first plain step
)


def compiled(
    f: Callable[..., Any], backend: str = "aot_eager", **options: Any
) -> tuple[Callable[..., Any], Any]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(f, fullgraph=True, backend=counter, **options), counter


def both_rules(row: Row, tensors: bool) -> tuple[Any, list[nn.Parameter]]:
    """Matrices, and gains and an embedding in a second group, by the companion AdamW."""
    matrices, others = make(torch.float32, SHAPES), make(torch.float32, ((11,), (12, 5)))
    groups = [{"params": matrices}, {"params": others, "rule": "adamw"}]
    opt = build(row, groups)
    for group in opt.param_groups if tensors else ():
        for key in RATES & group.keys():
            group[key] = torch.tensor(0.01, dtype=torch.float64)
    return opt, [*matrices, *others]


RATES = {"lr", "weight_decay"}


def set_rates(opt: Any, i: int) -> None:
    for group in opt.param_groups:
        for key in RATES & group.keys():
            rate = 0.01 / (1 + i) if key == "lr" else 0.1 + 0.01 * i
            if isinstance(group[key], Tensor):
                group[key].fill_(rate)
            else:
                group[key] = rate


WHOLE = ("AdamW", "Conda", "Muon")  # compiled as Inductor would; the others are traced only
KINDS = [
    (r, kind) for r in ROWS for kind in ("float", "tensor") if kind == "float" or r.name in WHOLE
]


@pytest.mark.parametrize(("row", "kind"), KINDS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_ten_rates_and_decays_one_graph(row: Row, kind: str) -> None:
    (ours, mine), (eager, theirs) = (both_rules(row, kind == "tensor") for _ in range(2))
    step, counter = compiled(ours.step, "aot_eager" if row.name in WHOLE else "eager")
    graphs = 0
    for i in range(WARM_UP + 10):
        set_grads(i, mine, theirs)
        for opt in (ours, eager):
            set_rates(opt, i)
        step()
        eager.step()
        for a, b in zip(snapshot(ours), snapshot(eager), strict=True):
            assert torch.equal(a, b), i
        if i == WARM_UP:  # Conda's second refresh, at step 4, had its graph
            graphs = counter.frame_count
    assert counter.frame_count == graphs > 0


@pytest.mark.parametrize(
    ("key", "settings"),
    [("momentum", {}), ("weight_decay", dict(decay="cautious")),
     ("weight_decay", dict(decay="clipped"))],
)  # fmt: skip
def test_others_are_scheduled_without_a_graph(key: str, settings: dict[str, Any]) -> None:
    params = make(torch.float32, SHAPES)
    opt = orthonorm.optim.Muon(params, lr=0.01, **settings)
    step, counter = compiled(opt.step)
    graphs = 0
    for i in range(6):
        set_grads(i, params)
        opt.param_groups[0][key] = 0.85 + 0.02 * i
        step()
        graphs = graphs if i > 2 else counter.frame_count
    assert counter.frame_count == graphs


@pytest.mark.parametrize("decay", ["cautious", "clipped"])
def test_decay_has_the_bits_of_eager(decay: str) -> None:
    mine, theirs = (make(torch.float32, SHAPES) for _ in range(2))
    settings: Any = dict(lr=0.02, weight_decay=0.37, decay=decay, bound=1.0)
    ours, eager = (orthonorm.optim.Muon(params, **settings) for params in (mine, theirs))
    step, _ = compiled(ours.step, "eager")
    for i in range(3):
        set_grads(i, mine, theirs)
        step()
        eager.step()
        assert all(map(torch.equal, mine, theirs)), i


def test_a_training_step_compiles() -> None:
    """Forward, backward and, compiled apart, the step of split_params' groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 7))
    opt = orthonorm.optim.Muon(orthonorm.optim.split_params(model, adamw=["0", "3"]), lr=0.05)
    step, _ = compiled(opt.step)
    tokens = torch.arange(7)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 7)
        loss.backward()
        step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ---- public functions ----------------------------------------------------------------------------
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "polar": orthonorm.polar,
    "polar gram": lambda X: orthonorm.polar(X, "you5", method="gram", precision="float32"),
    "polar bfloat16": lambda X: orthonorm.polar(X, "keller", precision="bfloat16", eps=1e-7),
    "polar list": lambda X: orthonorm.polar([X, X.mT])[1],
    "odd_polynomial": lambda X: orthonorm.odd_polynomial(X, [(1.5, -0.5, 0.0)]),
    "power_iteration": lambda X: orthonorm.power_iteration(X, steps=3),
    "spectral_norm": orthonorm.spectral_norm,
    "gram_iteration": orthonorm.gram_iteration,
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_shapes_are_dynamic(f: Callable[[Tensor], Any]) -> None:
    call, counter = compiled(f, dynamic=True)
    graphs = 0
    for shape in ((2, 13, 29), (3, 17, 31), (5, 14, 40), (2, 21, 23)):
        X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        got, want = call(X), f(X)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        assert all(torch.equal(a, b) for a, b in pairs)
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


@pytest.mark.parametrize("f", [orthonorm.spectral_norm, orthonorm.gram_iteration])
def test_gradients_compile(f: Callable[[Tensor], Tensor]) -> None:
    call, counter = compiled(lambda X: (f(X) * 2).sum(), dynamic=True)
    graphs = 0
    for shape in ((2, 8, 12), (3, 9, 13)):
        X = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        (got,) = torch.autograd.grad(call(X), X)
        (want,) = torch.autograd.grad((f(X) * 2).sum(), X)
        assert torch.equal(got, want)
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


def test_refusals_reach_the_caller() -> None:
    call, _ = compiled(lambda X: orthonorm.polar(X, "nope"))
    with pytest.raises(Exception, match="'nope'"):
        call(torch.ones(3, 4))
