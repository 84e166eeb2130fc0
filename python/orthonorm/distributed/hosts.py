"""Process groups over which the hosts of ranks talk, beside their accelerators.

What ranks tell each other before a step is known to their hosts. Over nccl it would have to pass
through the accelerator, and a host that reads the answers there waits until all that was queued,
the whole backward, is done. Over gloo it waits for the other hosts alone.
"""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


class Hosts(NamedTuple):
    """Where small messages go: a process group of the same ranks, and the device it takes."""

    group: dist.ProcessGroup
    device: torch.device


# destroy_process_group drops the keys, and a new init makes new ones
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def hosts_of(group: dist.ProcessGroup, device: torch.device) -> Hosts:
    """How the hosts of a group talk, whose parameters are on `device`.

    By the group itself where it has a backend for CPU tensors ("gloo", "cpu:gloo,cuda:nccl"); else
    by a gloo group of the same ranks, which is made at the first call and kept. All ranks of the
    group must make that call together, and a rank of several groups in the order of `in_order`.
    Without gloo: by the group and its device.
    """
    if CPU in group._device_types:  # as torch's own object collectives ask
        return Hosts(group, CPU)
    if not dist.is_gloo_available():
        return Hosts(group, device)
    if group not in _made:
        _made[group] = gloo(group)
    return Hosts(_made[group], CPU)


def gloo(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the ranks of another.

    Not by new_group(use_local_synchronization=True): ranks that are in different numbers of groups
    give its result different names, and wait for each other for ever (torch 2.13).
    """
    store, ranks = dist.distributed_c10d._get_default_store(), dist.get_process_group_ranks(group)
    place = f"orthonorm/hosts/{ranks}"
    times = store.add(f"{place}/times/{dist.get_rank()}", 1)  # the same on all
    store = dist.distributed_c10d.PrefixStore(f"{place}/{times}", store)
    made = dist.ProcessGroup(store, dist.get_rank(group), len(ranks))
    backend = dist.ProcessGroupGloo(store, made.rank(), len(ranks), patience(group))
    made._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    made._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, backend)
    return made


def patience(group: dist.ProcessGroup) -> timedelta:
    """How long a group waits for its ranks; torch's default where its backend does not say."""
    backend = group._get_backend(group._device_types[0])
    own = getattr(getattr(backend, "options", None), "_timeout", None)
    return own or dist.distributed_c10d.default_pg_timeout


def in_order(groups: list[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    """The order in which every rank talks in its groups, whatever that of its parameters.

    Of the groups that have not yet talked, all ranks of the first one are free for it or for one
    before it, so no ranks wait for each other in a circle.
    """
    return sorted(groups, key=dist.get_process_group_ranks)
