"""What comes from elsewhere: numbers of NumPy, and states of another Adam."""

from __future__ import annotations

import io

import pytest
import torch
from orthonorm import gram_iteration, ops, optim, polar
from torch.nn import Parameter as P

W = torch.ones(4, 6)


@pytest.mark.parametrize("settings", [dict(amsgrad=True), dict(decoupled_weight_decay=False)])
def test_states_of_another_adam_are_refused(settings: dict[str, bool]) -> None:
    """Their groups say which rule made them."""
    p, q = (P(torch.ones(3, 2)) for _ in range(2))
    q.grad = torch.ones_like(q)
    theirs = torch.optim.AdamW([q]) if "amsgrad" in settings else torch.optim.Adam([q])
    theirs.param_groups[0].update(settings)
    theirs.step()
    ours = optim.AdamW([p])
    (key, value), before = next(iter(settings.items())), ours.state_dict()
    with pytest.raises(ValueError, match=f"AdamW: {key} must be {not value}, got {value}"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == before


@pytest.mark.parametrize("name", optim.REGISTRY)
@pytest.mark.parametrize("real", ["float32", "float64"])  # the latter is a kind of float
def test_numbers_of_numpy_are_numbers(name: str, real: str) -> None:
    """They step as Python's, and saved groups have none of NumPy's."""
    numpy = pytest.importorskip("numpy")
    made = optim.REGISTRY[name]([P(torch.ones(1, 1))]).param_groups[0]
    kinds = {float: getattr(numpy, real), int: numpy.int64}
    given = {k: kinds[type(v)](v) for k, v in made.items() if type(v) in kinds}
    given["betas"] = tuple(map(kinds[float], made.get("betas", ())))
    given = {k: v for k, v in given.items() if k in made}
    assert "lr" in given
    torch.manual_seed(0)
    params = [P(torch.randn(6, 4).clone()) for _ in range(2)]
    params[1].data.copy_(params[0])
    plain = {k: tuple(map(float, v)) if k == "betas" else v.item() for k, v in given.items()}
    both = [optim.REGISTRY[name]([p], **s) for p, s in zip(params, (given, plain), strict=True)]
    grad = torch.randn(6, 4)
    for p, optimizer in zip(params, both, strict=True):
        p.grad = grad.clone()
        optimizer.step()
    assert torch.equal(*params)
    a, b = (optimizer.state_dict()["param_groups"] for optimizer in both)
    assert a == b and [*map(type, a[0].values())] == [*map(type, b[0].values())]
    saved = io.BytesIO()
    torch.save(a, saved)
    saved.seek(0)
    torch.load(saved, weights_only=True)  # which refuses numbers of NumPy


def test_counts_of_numpy_cut_weights() -> None:
    numpy = pytest.importorskip("numpy")
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(3, 4), "kv": torch.nn.Linear(3, 6)})
    one, two = numpy.array([1, 2])
    heads, split = {"q.weight": two}, {"kv.weight": (two * 2, two)}
    groups = optim.split_params(model, heads=heads, split=split)
    assert [(g.get("heads"), g.get("split")) for g in groups[:2]] == [(2, None), (None, (4, 2))]
    kinds = [type(groups[0]["heads"]), *map(type, groups[1]["split"])]
    assert kinds == [int] * 3
    optimizer = optim.Muon([{"params": [model["kv"].weight], "split": [one, one * 5]}])
    assert [*map(type, optimizer.param_groups[0]["split"])] == [int, int]


def test_numbers_of_numpy_in_ops() -> None:
    numpy = pytest.importorskip("numpy")
    assert torch.equal(ops.row_normalize(W, numpy.float32(0.5)), ops.row_normalize(W, 0.5))
    assert torch.equal(gram_iteration(W, numpy.int64(3)), gram_iteration(W, 3))
    given = dict(eps=numpy.float32(0.5), steps=numpy.int64(3))
    assert torch.equal(polar(W, **given), polar(W, eps=0.5, steps=3))
