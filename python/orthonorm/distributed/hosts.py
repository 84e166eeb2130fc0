"""Process groups over which the hosts of ranks exchange messages, without their accelerators.

Hosts know what ranks tell each other before a step. Over nccl it would pass through the
accelerator. A host that read the answer there would wait for all queued work, the whole backward.
Over gloo it waits for the other hosts alone.
"""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


class Hosts(NamedTuple):
    """Route of small messages: a process group of the same ranks, and the device of its tensors."""

    group: dist.ProcessGroup
    device: torch.device


# weak keys: destroy_process_group drops groups, and a new init makes new ones
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def hosts_of(group: dist.ProcessGroup, device: torch.device) -> Hosts:
    """Return the route between the hosts of a group whose parameters are on `device`.

    It is the group itself if that has a backend for CPU tensors ("gloo", "cpu:gloo,cuda:nccl").
    Else it is a gloo group of the same ranks, made at the first call and kept. All ranks of the
    group must make that call together; a rank of several groups follows `in_order`. Without gloo it
    is the group, with its own device.
    """
    if CPU in group._device_types:  # torch's own object collectives use this test
        return Hosts(group, CPU)
    if not dist.is_gloo_available():
        return Hosts(group, device)
    if group not in _made:
        _made[group] = gloo(group)
    return Hosts(_made[group], CPU)


def gloo(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Make a gloo group of the ranks of another group.

    new_group(use_local_synchronization=True) does not serve (torch 2.13). Ranks that are in
    different numbers of groups give its result different names, and wait for each other for ever.
    """
    store, ranks = dist.distributed_c10d._get_default_store(), dist.get_process_group_ranks(group)
    place = f"orthonorm/hosts/{ranks}"
    times = store.add(f"{place}/times/{dist.get_rank()}", 1)  # the same number on all ranks
    store = dist.distributed_c10d.PrefixStore(f"{place}/{times}", store)
    made = dist.ProcessGroup(store, dist.get_rank(group), len(ranks))
    backend = dist.ProcessGroupGloo(store, made.rank(), len(ranks), patience(group))
    made._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    made._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, backend)
    return made


def patience(group: dist.ProcessGroup) -> timedelta:
    """Return how long a group waits for its ranks; torch's default if its backend has no value."""
    backend = group._get_backend(group._device_types[0])
    own = getattr(getattr(backend, "options", None), "_timeout", None)
    return own or dist.distributed_c10d.default_pg_timeout


def in_order(groups: list[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    """Return groups in the one order in which every rank uses them, whatever its parameters.

    Take the first group, in this order, that has not yet exchanged anything. None of its ranks
    waits in a later group. So ranks cannot wait for each other in a circle.
    """
    return sorted(groups, key=dist.get_process_group_ranks)
