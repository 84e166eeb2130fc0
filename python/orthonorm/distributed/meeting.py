"""Before its first collective an optimizer meets its peers in the store of the process group.

Ranks that place a parameter on different meshes, or some of which need no exchange for it, would
wait in different collectives. In the store none waits for what another does not do: a rank leaves
what it holds there, and compares it with what the others of its meshes have left.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from ..optim.tensors import is_distributed

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer

FIRST = 10.0  # seconds for all ranks to come to the first step; who is later is not compared with


class Entry(NamedTuple):
    """A parameter that ranks share."""

    label: str
    text: str
    ranks: tuple[int, ...]  # of its mesh


Digests = dict[str, list[int]]  # of the entries of a mesh: its ranks


def describe(opt: MatrixOptimizer, p: Any, group: dict[str, Any], index: int) -> str:
    mesh = p.device_mesh
    keys = ("flatten", "split", "heads", "method", "decay", "constraint")  # what decides the way
    views = {k: group[k] for k in keys if group.get(k) not in (None, "auto", "decoupled")}
    return (
        f"{opt.label(group, index)} {tuple(p.shape)} {p.dtype}, {tuple(p.placements)} on mesh "
        f"{mesh.mesh.tolist()}, rule={group['rule']!r}" + (f", {views}" if views else "")
    )


def meet(opt: MatrixOptimizer) -> None:
    """Raise on every rank of whose meshes one has the same parameters otherwise; once.

    Two small values a rank in the store, and no collective. Ranks know each other's optimizer by
    the names of its parameters. One that does not come in time, or that has others, is left to the
    collectives, which tell what is gone or more.
    """
    if opt.met or not (dist.is_available() and dist.is_initialized()):
        return
    mine = entries(opt)
    if not mine or dist.get_backend() == "fake":  # whose store keeps nothing
        return
    store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
    name = f"orthonorm/first/{digest(sorted(entry.label for entry in mine))}"
    place = f"{name}/{store.add(f'{name}/times/{me}', 1)}/"
    store.set(f"{place}{me}/entries", zlib.compress(json.dumps(mine).encode()).hex())
    own = digests(mine)
    store.set(f"{place}{me}", json.dumps(own))
    peers = sorted({r for entry in mine for r in entry.ranks})
    came = arrived(store, place, peers)
    others = zip(came, map(json.loads, store.multi_get([f"{place}{r}" for r in came])), strict=True)
    if bad := [r for r, theirs in others if r != me and differs(own, theirs, me, r)]:
        good = [r for r in came if r not in bad]
        raise ValueError(f"{opt.name}: {sentence(store, place, good, bad[0], me)}")
    opt.met = True


def entries(opt: MatrixOptimizer) -> list[Entry]:
    return [
        Entry(opt.label(group, i), describe(opt, p, group, i), ranks)
        for group in opt.param_groups for i, p in enumerate(group["params"])
        if is_distributed(p) and len(ranks := tuple(p.device_mesh.mesh.flatten().tolist())) > 1
    ]  # fmt: skip


def digests(some: list[Entry]) -> Digests:
    texts: dict[tuple[int, ...], list[str]] = {}
    for entry in some:
        texts.setdefault(entry.ranks, []).append(entry.text)
    return {digest(lines): list(ranks) for ranks, lines in texts.items()}


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def arrived(store: Any, place: str, peers: list[int]) -> list[int]:
    """Those that have left what they hold, as soon as all have."""
    try:
        store.wait([f"{place}{r}" for r in peers], timedelta(seconds=FIRST))
    except RuntimeError:
        return [r for r in peers if store.check([f"{place}{r}"])]
    return peers


def differs(mine: Digests, theirs: Digests, me: int, other: int) -> bool:
    """Whether a rank has something else on the meshes that we both are on."""
    shared = {text for text, ranks in theirs.items() if me in ranks}
    return shared != {text for text, ranks in mine.items() if other in ranks}


def left(store: Any, place: str, rank: int) -> list[Entry]:
    data = zlib.decompress(bytes.fromhex(store.get(f"{place}{rank}/entries").decode()))
    return [Entry(label, text, tuple(ranks)) for label, text, ranks in json.loads(data)]


def sentence(store: Any, place: str, good: list[int], bad: int, me: int) -> str:
    """How the first rank that has what I have, and the first that has not, differ."""
    lists = {}
    for good_one in (*good, me):  # some may share no mesh with the bad one
        lists = {
            a: [x.text for x in left(store, place, a) if b in x.ranks]
            for a, b in ((good_one, bad), (bad, good_one))
        }
        if lists[good_one] != lists[bad]:
            break
    (a, first), (b, other) = sorted(lists.items())
    i = next(
        i for i in range(max(map(len, lists.values()))) if first[i : i + 1] != other[i : i + 1]
    )
    has = [(x[i : i + 1] or ["none that both are to hold"])[0] for x in (first, other)]
    return (
        f"all ranks of a mesh must have the same parameters in the same order, got at place {i}: "
        f"parameter {has[0]} on rank {a}, {has[1]} on rank {b} (this is rank {me})"
    )
