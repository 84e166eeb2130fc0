"""share_work in one process; distributed_copies.py has it on several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from orthonorm import optim
from orthonorm.distributed import comm_report, share_work
from torch import nn


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_ranks_there_is_no_work_to_share() -> None:
    with pytest.raises(ValueError, match="process group"):
        share_work(optim.Muon([nn.Parameter(torch.ones(3, 2))]))


@pytest.mark.usefixtures("alone")
def test_other_optimizers_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"share_work: optimizer must be one of orthonorm\.optim, got SGD"
    ):
        share_work(torch.optim.SGD([nn.Parameter(torch.ones(3, 2))]))


@pytest.mark.usefixtures("alone")
def test_one_rank_shares_nothing() -> None:
    p = nn.Parameter(torch.eye(3, 2))
    p.grad = torch.ones(3, 2)
    opt = optim.Muon([p])
    share_work(opt)
    assert opt.company is None
    opt.step()
    report = comm_report(opt)
    assert (report.gathers, report.launches, report.local) == (0, 0, 1)
