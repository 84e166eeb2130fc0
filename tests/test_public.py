"""Every public item of orthonorm.nn and orthonorm.monitor: documented, in the table of cases, equal
to an independent formula in float64, differentiated exactly."""

from __future__ import annotations

import inspect
import re

import orthonorm.monitor
import orthonorm.nn
import pytest
import torch
from orthonorm.bench.inputs import Inputs
from orthonorm.bench.items import flat
from orthonorm.bench.public import ITEMS, RESULTS
from torch import Tensor

MODULES = {"nn": orthonorm.nn, "monitor": orthonorm.monitor}
NAMES = [f"{m}.{name}" for m, module in MODULES.items() for name in module.__all__]
SAYS = {
    "shapes": r"\([^()]*,[^()]*\)|\(\)|[Ss]hapes?\b",
    "cost": r"\b[Cc]osts?\b",
    "source": r"\bSources?: \S",
}


def test_every_item_has_a_row() -> None:
    assert set(NAMES) == {*ITEMS, *RESULTS}


@pytest.mark.parametrize("name", ITEMS)
def test_docstring(name: str) -> None:
    """A formula in the first line; shapes, cost and source."""
    module, item = name.split(".")
    text = inspect.getdoc(getattr(MODULES[module], item)) or ""
    words = " ".join(text.split())
    missing = [what for what, pattern in SAYS.items() if not re.search(pattern, words)]
    assert not missing
    assert re.search(r"[=<>^]|- |\(\w+ - |-> | / ", text.splitlines()[0]), text.splitlines()[0]


@pytest.mark.parametrize("name", ITEMS)
def test_formula(name: str) -> None:
    for shape in ((6, 9), (8, 5)):
        if name == "monitor.farms_alpha" and shape == (8, 5):
            continue  # no room for its windows
        made = [ITEMS[name].arguments(shape, Inputs(torch.float64)) for _ in range(2)]
        got, want = ITEMS[name].of(name)(**made[0]), ITEMS[name].formula(**made[1])
        got, want = list(flat(got)), list(flat(want))
        assert len(got) == len(want) > 0
        for x, y in zip(got, want, strict=True):
            assert (x - y).norm() <= ITEMS[name].rtol * y.norm() + 1e-12


@pytest.mark.parametrize("name", [name for name, item in ITEMS.items() if item.gradient])
def test_gradient(name: str) -> None:
    item = ITEMS[name]
    made = item.arguments((3, 4), Inputs(torch.float64))
    leaves = []
    for key in item.gradient:
        values = made[key] if isinstance(made[key], list) else [made[key]]
        leaves.append([v.detach().requires_grad_() for v in values])
    call = item.of(name)

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = list(tensors)
        given = dict(made)
        for key, group in zip(item.gradient, leaves, strict=True):
            mine = [rest.pop(0) for _ in group]
            given[key] = mine if isinstance(made[key], list) else mine[0]
        out = call(**given)
        return tuple(out) if isinstance(out, (list, tuple)) else (out,)

    assert torch.autograd.gradcheck(f, [x for group in leaves for x in group])
