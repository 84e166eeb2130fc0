"""Arguments are checked once: not again inside a checked op, not by the ops of an optimizer's step,
and always where a stranger calls."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import orthonorm
import pytest
import torch
from orthonorm import OPS, ops, optim
from orthonorm.bench.cases import CASES
from orthonorm.bench.inputs import Inputs
from test_ops import made
from torch import nn

torch_ops = torch.ops.orthonorm


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often every op checked its arguments."""
    counts: Counter[str] = Counter()
    for name, op in OPS.items():
        if (check := op._check) is None:
            continue

        def counted(*args: Any, name: str = name, check: Any = check, **kwargs: Any) -> None:
            counts[name] += 1
            check(*args, **kwargs)

        monkeypatch.setattr(op, "_check", counted)
    yield counts


COMPOSITE = [case for case in CASES.values() if case.op.composite]


@pytest.mark.parametrize("case", COMPOSITE, ids=lambda c: c.name)
def test_what_an_op_calls_is_not_checked_again(case: Any, checks: Counter[str]) -> None:
    for mode in (torch.no_grad(), orthonorm.reference()):  # kernels, and definitions alone
        for call in (case.op, case.op.overload):
            checks.clear()
            with mode:
                call(**made(case, ((5, 9), (160, 130)), Inputs()))
            assert checks == {case.name: 1} or (not checks and call is not case.op)  # C++ has its


@pytest.mark.parametrize("name", sorted(optim.REGISTRY))
def test_a_step_checks_what_it_was_given_once(name: str, checks: Counter[str]) -> None:
    """Its settings, gradients and state: no op does so again, whoever serves it."""
    params = [nn.Parameter(torch.randn(s)) for s in ((9, 6), (6, 9), (2, 5, 4))]
    opt = optim.REGISTRY[name](params)
    for mode in (torch.no_grad(), orthonorm.reference()):
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            with mode:
                opt.step()
    assert not checks


BAD = ([torch.zeros(3, 4)], [torch.zeros(4, 3)], torch.tensor(0.1), 0.0, [1.0])


def refuses() -> None:
    with pytest.raises(ValueError, match=r"decayed_update_: updates\[0\] must have the shape"):
        OPS["decayed_update_"].checked(lambda *_: None)(*BAD)  # as a dispatch key has a kernel


def test_strangers_are_checked_after_whatever_happened() -> None:
    refuses()
    ops.newton_schulz([torch.randn(5, 9)], [1.5, -0.5, 0.0], [])
    refuses()
    gram = OPS["gram"]
    body, gram._body = gram._body, lambda X: 1 / 0
    try:
        for call in (gram.reference, gram.checked(lambda X: 1 / 0)):
            with pytest.raises(ZeroDivisionError):
                call(torch.ones(2, 2))
            refuses()
        with orthonorm.reference(), pytest.raises(ZeroDivisionError):
            OPS["newton_schulz"].unchecked([torch.randn(150, 160)], [1.5, -0.5, 0.0], [], "direct")
        refuses()
    finally:
        gram._body = body


def test_strangers_are_checked_in_other_threads_and_after_calls_within_calls() -> None:
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            refuses()
        except BaseException as error:
            failures.append(error)

    def body(X: torch.Tensor) -> torch.Tensor:
        OPS["gram"].unchecked(X)
        OPS["decayed_update_"].checked(lambda *_: None)(*BAD)  # of a checked op: trusted
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return X

    OPS["gram"].checked(body)(torch.ones(2, 2))
    assert not failures
    refuses()


def changed(what: str) -> tuple[Any, nn.Parameter]:
    """An optimizer after a step, and behind its back a tensor that no longer fits."""
    p = nn.Parameter(torch.randn(6, 4))
    opt = optim.Muon([p], lr=0.1)
    p.grad = torch.randn_like(p)
    opt.step()
    momentum = opt.state[p]["momentum_buffer"]
    if what == "state":
        momentum.data = torch.zeros(3, 4)
    elif what == "the dtype of state":
        momentum.data = torch.zeros(6, 4, dtype=torch.int32)
    elif what == "gradient":
        p.grad.data = torch.zeros(5, 4)
    elif what == "parameter":
        p.data = torch.randn(7, 4)
    elif what == "parameter and gradient":
        p.data, p.grad = torch.randn(7, 4), None
        p.grad = torch.randn(7, 4)
    elif what == "the dtype of a parameter":
        p.data, p.grad = torch.ones(6, 4, dtype=torch.complex64), None
        p.grad = torch.ones(6, 4, dtype=torch.complex64)
    return opt, p


@pytest.mark.parametrize(
    "what", ["state", "the dtype of state", "gradient", "parameter",
             "parameter and gradient", "the dtype of a parameter"],
)  # fmt: skip
def test_what_was_changed_behind_the_optimizers_back_is_refused(what: str) -> None:
    opt, p = changed(what)
    before = p.detach().clone()
    with pytest.raises((ValueError, TypeError), match="Muon: "):
        opt.step()
    assert torch.equal(p.detach(), before)
