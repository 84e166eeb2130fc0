"""Stochastic rounding of bfloat16 weights: what it draws, and that every backend draws the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from orthonorm import ops
from orthonorm.bench.inputs import LAYOUTS, Inputs, place
from orthonorm.ops.rounding import places, random_bits, stochastic
from torch import Tensor

BF16 = torch.bfloat16
SEEDS = (0, 1, -1, 7 << 40)


def by_hand(seed: int, where: int) -> int:
    """The definition on Python's integers."""

    def hashed(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    seed %= 2**64
    key = hashed(hashed(seed % 2**32 ^ 0x9E3779B9) ^ (seed >> 32))
    return hashed(key ^ (where % 2**32) ^ ((where >> 32) * 0x9E3779B9 % 2**32)) % 2**16


def test_bits_are_those_of_the_definition() -> None:
    where = [0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**40 + 7]
    for seed in (*SEEDS, 2**63 - 1, -(2**63)):
        drawn = random_bits(torch.tensor(seed), torch.tensor(where))
        assert drawn.tolist() == [by_hand(seed, w) for w in where]


@pytest.mark.parametrize("part", [1 / 64, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounds_up_as_often_as_it_should(part: float, sign: float) -> None:
    """x a part of the way from one bfloat16 number to the next: to the next, that often."""
    count = 2**18
    x = torch.full((count,), sign * (1 + part / 128))
    for seed in SEEDS:
        rounded = stochastic(x, torch.tensor(seed), places(x))
        up = rounded == sign * (1 + 1 / 128)
        assert bool((up | (rounded == sign)).all())
        deviation = (part * (1 - part) / count) ** 0.5
        assert abs(up.double().mean() - part) < 4 * deviation


def test_what_bfloat16_has_is_kept() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-133, 3e38, torch.inf, -torch.inf], dtype=BF16)
    for seed in SEEDS:
        rounded = stochastic(x.float(), torch.tensor(seed), places(x))
        assert torch.equal(rounded.to(BF16).view(torch.int16), x.view(torch.int16))
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert bool(stochastic(nan, torch.tensor(1), places(nan)).isnan().all())


def test_small_updates_are_not_lost() -> None:
    """1000 updates of 2^-12: rounded to nearest each is lost, stochastically they add up."""
    nearest, kept = torch.ones(4096, dtype=BF16), torch.ones(4096, dtype=BF16)
    update, numbers = torch.full((4096,), -(2.0**-12)), (torch.tensor(1.0), torch.tensor(0.0))
    for step in range(1000):
        ops.decayed_update_([nearest], [update], *numbers, [1.0])
        ops.decayed_update_([kept], [update], *numbers, [1.0], torch.tensor(step))
    assert bool((nearest == 1).all())
    # the mean of 4096 walks of 1000 steps up by 2^-7 with probability 2^-5
    deviation = (1000 * 2**-5 / 4096) ** 0.5 * 2**-7
    assert abs(kept.double().mean() - (1 + 1000 * 2**-12)) < 4 * deviation


def weights(layout: str) -> list[Tensor]:
    """Without tails, with them, of many dimensions and of two tiles."""
    shapes = ((64, 64), (3, 41, 37), (2, 3, 5, 16), (97, 128), (1,), (0, 4))
    return [place(torch.randn(s).to(BF16), layout) for s in shapes]


def check_same_bits(op: Callable[..., Any]) -> None:
    """Against the reference, where arithmetic is exact but for one rounding to float32."""
    for layout in LAYOUTS:
        for seed in SEEDS:
            params = weights(layout)
            mine, theirs = ([place(w.clone(), layout) for w in params] for _ in range(2))
            updates = [torch.randn_like(w, dtype=torch.float32) for w in params]
            numbers = (torch.tensor(0.25), torch.tensor(0.0))
            given = (*numbers, [0.5] * len(params), torch.tensor(seed))
            op(mine, updates, *given)
            ops.decayed_update_.reference(theirs, updates, *given)
            for a, b in zip(mine, theirs, strict=True):
                assert torch.equal(a, b), (layout, seed)


def test_same_bits() -> None:
    check_same_bits(ops.decayed_update_)


def test_places_beyond_32_bits() -> None:
    """The memory between the rows is never touched."""
    stride = 2**32 + 8
    mine, theirs = (torch.empty(stride + 3, dtype=BF16).as_strided((2, 3), (stride, 1)).fill_(1)
                    for _ in range(2))  # fmt: skip
    numbers = (torch.tensor(0.5), torch.tensor(0.0))
    given = ([torch.randn(2, 3)], *numbers, [1.0], torch.tensor(5))
    ops.decayed_update_([mine], *given)
    ops.decayed_update_.reference([theirs], *given)
    assert torch.equal(mine, theirs)


def test_other_dtypes_are_rounded_to_nearest() -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        inputs = Inputs(dtype)
        w, u = inputs.matrix("w", (33, 65)), inputs.matrix("u", (33, 65))
        plain, seeded = w.clone(), w.clone()
        given = ([u], torch.tensor(0.1), torch.tensor(0.1), [1.0])
        ops.decayed_update_([plain], *given)
        ops.decayed_update_([seeded], *given, torch.tensor(3))
        assert torch.equal(plain, seeded)


@pytest.mark.parametrize(
    ("seed", "error"),
    [(3, TypeError), (torch.tensor(3.0), TypeError), (torch.tensor([3]).int(), TypeError),
     (torch.tensor([1, 2]), ValueError), (torch.tensor(3, device="meta"), ValueError)],
)  # fmt: skip
def test_bad_seeds(seed: Any, error: type[Exception]) -> None:
    w = torch.ones(3, 4, dtype=BF16)
    given = ([torch.ones(3, 4)], torch.tensor(0.1), torch.tensor(0.0), [1.0])
    with pytest.raises(error, match="decayed_update_: rounding must"):
        ops.decayed_update_([w], *given, rounding=seed)
    assert bool((w == 1).all())
