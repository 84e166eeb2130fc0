"""torch's tables of inputs and errors of its own Muon and AdamW, given to ours.

Run by test_torch_demands.py in a process of its own: the import locks torch.backends' flags.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizer_rows import make, set_grads, snapshot
from orthonorm import optim
from torch.testing._internal import common_optimizers

SHAPES = ((12, 7), (7, 12))
OURS = {torch.optim.Muon: optim.Muon, torch.optim.AdamW: optim.AdamW}
INFOS = [info for info in common_optimizers.optim_db if info.optim_cls in OURS]
INPUTS = [(info.optim_cls, x) for info in INFOS for x in info.optim_inputs_func("cpu")]
ERRORS = [
    (info.optim_cls, x)
    for info in INFOS
    for x in info.optim_error_inputs_func("cpu", torch.float32)
]

TAKEN = (  # batches are, and a rate on the device needs no graph
    "only support 2D parameters",
    "lr as Tensor doesn't work with foreach & not capturable",
)


def name_of(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    return str(getattr(value, "optimizer_error_input", None) or value.desc)


@pytest.mark.parametrize(("theirs", "given"), INPUTS, ids=name_of)
def test_inputs_of_torch(theirs: type, given: Any) -> None:
    """The same three steps, or a refusal (AdamW has no amsgrad)."""
    if given.kwargs.get("amsgrad"):
        with pytest.raises(ValueError, match="amsgrad must be False, got True"):
            OURS[theirs](make(torch.float32, SHAPES), **given.kwargs)
        return
    mine, other = make(torch.float32, SHAPES), make(torch.float32, SHAPES)
    a, b = (cls(ps, **copy.deepcopy(given.kwargs)) for cls, ps in
            ((OURS[theirs], mine), (theirs, other)))  # fmt: skip
    before = snapshot(a)
    for step in range(3):
        set_grads(step, mine, other)
        a.step()
        b.step()
    for p, q, old in zip(mine, other, before, strict=False):
        bound = 3e-2 if theirs is torch.optim.Muon else 1e-5  # theirs iterates in bfloat16
        assert (p - q).norm() <= bound * (q - old).norm()


@pytest.mark.parametrize(("theirs", "given"), ERRORS, ids=name_of)
def test_errors_of_torch(theirs: type, given: Any) -> None:
    x = given.optimizer_error_input
    params = make(torch.float32, SHAPES) if x.params is None else x.params
    if x.desc in TAKEN:
        assert OURS[theirs](params, **x.kwargs).param_groups
        return
    with pytest.raises((ValueError, TypeError)):
        OURS[theirs](params, **x.kwargs)
