"""A comparison of ranks in the process group's store, before an optimizer's first collective.

Ranks would wait in different collectives if they place a parameter on different meshes, or if only
some of them exchange it. The store needs no matching calls. Each rank writes what it holds there,
and compares it with what the other ranks of its meshes have written.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ..optim.tensors import is_distributed, mesh_places, mesh_ranks
from ..optim.views import VIEW_DEFAULTS
from .company import shared

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer

FIRST = 10.0  # seconds for ranks to come to the first step; later ones are not compared
HEEDS = 60.0  # seconds in which a rank that shares nothing still looks for objections of others
NONE = "none that both are to hold"


class Entry(NamedTuple):
    """A parameter's label and description, and the ranks of its mesh if there are several."""

    label: str
    text: str
    ranks: tuple[int, ...] = ()


class Unshared(NamedTuple):
    """State of a rank that shares nothing: it does not wait, but raises if others object."""

    objection: str  # key in the store
    until: float  # time.monotonic()


Digests = dict[str, list[int]]  # by the digest of a mesh's entries: its ranks


def describe(opt: MatrixOptimizer, p: Any, group: dict[str, Any], index: int) -> str:
    # settings that decide whether and how the parameter travels
    keys = (*VIEW_DEFAULTS, "method", "decay", "constraint", "state_dtype")
    usual = (None, "auto", "decoupled")
    views = {k: group[k] for k in keys if group.get(k) not in (*usual, VIEW_DEFAULTS.get(k))}
    place = "a plain tensor"
    if is_distributed(p):
        place = f"{tuple(p.placements)} on mesh {mesh_ranks(p.device_mesh)}"
    if shared(opt, p, group):
        place += f" shared by ranks {dist.get_process_group_ranks(opt.company.group)}"
    return (
        f"{opt.label(group, index)} {tuple(p.shape)} {p.dtype}, {place}, rule={group['rule']!r}"
        + (f", {views}" if views else "")
    )


def meet(opt: MatrixOptimizer) -> None:
    """Raise ValueError if a rank on one of this rank's meshes describes parameters differently.

    Each rank writes digests and compressed descriptions into the store; there is no collective. An
    optimizer that has passed is not compared again. Ranks find each other's optimizer by the names
    of its shared parameters, or else of all its parameters. A rank that is late, or has other
    names, is not compared here: the collectives then report that it is missing, or what it has
    more.
    """
    if opt.met is True or torch.compiler.is_compiling() or not in_company():
        return
    store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
    if isinstance(opt.met, Unshared):
        opt.met = heed(opt, store, me)
        return
    everything = entries(opt)
    mine = [entry for entry in everything if entry.ranks]
    own = digests(mine)
    places = places_of(store, me, [mine, everything] if mine else [everything])
    for place in places:
        store.set(f"{place}{me}/entries", zlib.compress(json.dumps(everything).encode()).hex())
        store.set(f"{place}{me}", json.dumps(own))
    if not mine:
        opt.met = Unshared(f"{places[-1]}objection", time.monotonic() + HEEDS)
        return
    came = arrived(store, places, sorted({r for entry in mine for r in entry.ranks}))
    keys = [f"{place}{r}" for r, place in came.items()]
    others = zip(came, map(json.loads, store.multi_get(keys)), strict=True)
    if bad := [r for r, theirs in others if r != me and differs(own, theirs, me, r)]:
        text = sentence(store, came, [r for r in came if r not in bad], bad[0], me)
        for place in places:
            store.set(f"{place}objection", text)
        raise ValueError(f"{opt.name}: {text} (this is rank {me})")
    opt.met = True


def in_company() -> bool:
    """True if there is a store that other ranks see; that of the backend "fake" keeps nothing."""
    there = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return there and dist.get_backend() != "fake"


def heed(opt: MatrixOptimizer, store: Any, me: int) -> Unshared | bool:
    """Return True once the time for objections is over, else the unchanged `Unshared`.

    Raise ValueError if other ranks have found a difference.
    """
    assert isinstance(opt.met, Unshared)
    if store.check([opt.met.objection]):
        text = store.get(opt.met.objection).decode()
        opt.met = False
        raise ValueError(f"{opt.name}: {text} (this is rank {me})")
    return opt.met if time.monotonic() < opt.met.until else True


def places_of(store: Any, me: int, lists: list[list[Entry]]) -> list[str]:
    """Return store key prefixes for this optimizer's n-th meeting, one per parameter list."""
    labels = [sorted(entry.label for entry in some) for some in lists]
    names = dict.fromkeys(f"orthonorm/first/{digest(some)}" for some in labels)
    return [f"{name}/{store.add(f'{name}/times/{me}', 1)}/" for name in names]


def entries(opt: MatrixOptimizer) -> list[Entry]:
    return [
        entry(opt, p, group, i)
        for group in opt.param_groups for i, p in enumerate(group["params"])
    ]  # fmt: skip


def entry(opt: MatrixOptimizer, p: Any, group: dict[str, Any], index: int) -> Entry:
    """Return the entry of `p`, without ranks if no other rank shares it."""
    label = opt.label(group, index)
    if shared(opt, p, group):
        ranks = tuple(dist.get_process_group_ranks(opt.company.group))
    elif is_distributed(p):
        ranks = tuple(mesh_places(p.device_mesh))
    else:
        return Entry(label, f"{label} {tuple(p.shape)} {p.dtype}, a plain tensor")
    return Entry(label, describe(opt, p, group, index), ranks if len(ranks) > 1 else ())


def digests(some: list[Entry]) -> Digests:
    """Return the ranks of every mesh by the digest of the entries on it."""
    texts: dict[tuple[int, ...], list[str]] = {}
    for entry in some:
        texts.setdefault(entry.ranks, []).append(entry.text)
    return {digest(lines): list(ranks) for ranks, lines in texts.items()}


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def arrived(store: Any, places: list[str], peers: list[int]) -> dict[int, str]:
    """Return prefixes by rank, for ranks that have written; wait up to FIRST seconds for all."""
    try:
        store.wait([f"{places[0]}{r}" for r in peers], timedelta(seconds=FIRST))
    except RuntimeError:
        found = ((r, place) for r in peers for place in reversed(places))
        return {r: place for r, place in found if store.check([f"{place}{r}"])}
    return dict.fromkeys(peers, places[0])


def differs(mine: Digests, theirs: Digests, me: int, other: int) -> bool:
    """True if another rank has other entries on the meshes that hold both it and this rank."""
    both = {text for text, ranks in theirs.items() if me in ranks}
    return both != {text for text, ranks in mine.items() if other in ranks}


def left(store: Any, place: str, rank: int) -> list[Entry]:
    """Return the entries that a rank has written to the store."""
    data = zlib.decompress(bytes.fromhex(store.get(f"{place}{rank}/entries").decode()))
    return [Entry(label, text, tuple(ranks)) for label, text, ranks in json.loads(data)]


def sentence(store: Any, came: dict[int, str], good: list[int], bad: int, me: int) -> str:
    """Return how rank `bad` differs from the first rank of `good` with which it shares meshes."""
    held_by = {bad: left(store, came[bad], bad)}
    a = me
    for a in (*good, me):  # some may share no mesh with `bad`
        held_by[a] = left(store, came[a], a)
        if common(held_by[a], bad) != common(held_by[bad], a):
            break
    a, b = sorted((a, bad))
    first, other = common(held_by[a], b), common(held_by[b], a)
    i = next(i for i in range(max(len(first), len(other))) if first[i : i + 1] != other[i : i + 1])
    labels = {x.label for some in (first, other) for x in some[i : i + 1]}
    has = [
        next((x.text for x in (*some[i : i + 1], *everything) if x.label in labels), NONE)
        for some, everything in ((first, held_by[a]), (other, held_by[b]))
    ]
    return (
        f"all ranks of a mesh must have the same parameters in the same order, got at place {i}: "
        f"parameter {has[0]} on rank {a}, {has[1]} on rank {b}"
    )


def common(some: list[Entry], rank: int) -> list[Entry]:
    """Return the entries on meshes that hold `rank`, without their ranks."""
    return [Entry(x.label, x.text) for x in some if rank in x.ranks]
