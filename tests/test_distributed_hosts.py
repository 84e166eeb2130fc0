"""Which group the hosts of ranks talk over; distributed_hosts.py has it on several ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from orthonorm.distributed import agreement, hosts

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
Start = Callable[[], None]


@pytest.fixture
def start() -> Iterator[Start]:
    """A world of this process alone, and its end."""
    yield lambda: dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if dist.is_initialized():
        dist.destroy_process_group()


def group_of(backend: str, **kwargs: timedelta) -> dist.ProcessGroup:
    return dist.new_group([0], backend=backend, use_local_synchronization=True, **kwargs)


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:gloo", "cpu:gloo"])
def test_a_group_with_a_cpu_backend_is_used_as_it_is(
    backend: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    group = group_of(backend)
    monkeypatch.setattr(hosts, "gloo", None)
    assert hosts.hosts_of(group, CUDA) == (group, CPU)
    assert hosts.hosts_of(group, CPU) == (group, CPU)
    assert agreement.gathered(group, CUDA, -7) == [-7]


def test_a_gloo_group_is_made_once_with_the_patience_of_the_other(start: Start) -> None:
    start()
    group = group_of("cuda:gloo", timeout=timedelta(seconds=77))
    found, device = hosts.hosts_of(group, CUDA)
    assert found is not group and device == CPU
    assert isinstance(found._get_backend(CPU), dist.ProcessGroupGloo)
    assert found._get_backend(CPU).options._timeout == timedelta(seconds=77)
    assert hosts.hosts_of(group, CUDA).group is found
    assert hosts.hosts_of(group_of("cuda:gloo"), CUDA).group is not found
    assert agreement.gathered(group, CUDA, 2**63 - 1) == [2**63 - 1]
    assert agreement.gathered_objects(group, CUDA, "text") == ["text"]


def test_groups_end_and_begin_anew(start: Start) -> None:
    kept = len(hosts._made)
    for _ in range(2):
        start()
        assert hosts.hosts_of(group_of("cuda:gloo"), CUDA).device == CPU
        assert len(hosts._made) == kept + 1
        dist.destroy_process_group()
        gc.collect()
        assert len(hosts._made) == kept


def test_without_gloo_the_group_itself_is_used(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    group = group_of("cuda:gloo")
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert hosts.hosts_of(group, CUDA) == (group, CUDA)
