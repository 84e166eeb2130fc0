"""Before its first collective an optimizer meets its peers in the store of the process group.

Ranks that place a parameter on different meshes, or some of which need no exchange for it, would
wait in different collectives. In the store none waits for what another does not do: a rank leaves
what it holds there, and compares it with what the others of its meshes have left.
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
from .company import shared

if TYPE_CHECKING:
    from ..optim.base import MatrixOptimizer

FIRST = 10.0  # seconds for all ranks to come to the first step; who is later is not compared with
HEEDS = 60.0  # seconds for which a rank that shares nothing asks whether others thought it would
NONE = "none that both are to hold"


class Entry(NamedTuple):
    """A parameter, and the ranks of its mesh, if it is shared."""

    label: str
    text: str
    ranks: tuple[int, ...] = ()


class Unshared(NamedTuple):
    """A rank that shares nothing waits for no one; it raises what others say of it meanwhile."""

    objection: str  # where in the store
    until: float


Digests = dict[str, list[int]]  # of the entries of a mesh: its ranks


def describe(opt: MatrixOptimizer, p: Any, group: dict[str, Any], index: int) -> str:
    # what decides the way, and what travels on it
    keys = ("flatten", "split", "heads", "method", "decay", "constraint", "state_dtype")
    views = {k: group[k] for k in keys if group.get(k) not in (None, "auto", "decoupled")}
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
    """Raise on every rank of whose meshes one has the same parameters otherwise; once.

    A few small values a rank in the store, and no collective. Ranks know each other's optimizer by
    the names of its shared parameters, or else of all. One that does not come in time, or that has
    others, is left to the collectives, which tell what is gone or more.
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
    """Whether there is a store that other ranks see; that of the backend "fake" keeps nothing."""
    there = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return there and dist.get_backend() != "fake"


def heed(opt: MatrixOptimizer, store: Any, me: int) -> Unshared | bool:
    """Whether a rank that shares nothing is past its time to hear what others say of that."""
    assert isinstance(opt.met, Unshared)
    if store.check([opt.met.objection]):
        text = store.get(opt.met.objection).decode()
        opt.met = False
        raise ValueError(f"{opt.name}: {text} (this is rank {me})")
    return opt.met if time.monotonic() < opt.met.until else True


def places_of(store: Any, me: int, lists: list[list[Entry]]) -> list[str]:
    """Where those meet who have parameters of these names, each list's, for the nth time."""
    labels = [sorted(entry.label for entry in some) for some in lists]
    names = dict.fromkeys(f"orthonorm/first/{digest(some)}" for some in labels)
    return [f"{name}/{store.add(f'{name}/times/{me}', 1)}/" for name in names]


def entries(opt: MatrixOptimizer) -> list[Entry]:
    return [
        entry(opt, p, group, i)
        for group in opt.param_groups for i, p in enumerate(group["params"])
    ]  # fmt: skip


def entry(opt: MatrixOptimizer, p: Any, group: dict[str, Any], index: int) -> Entry:
    """A mesh of one rank is not shared."""
    label = opt.label(group, index)
    if shared(opt, p, group):
        ranks = tuple(dist.get_process_group_ranks(opt.company.group))
    elif is_distributed(p):
        ranks = tuple(mesh_places(p.device_mesh))
    else:
        return Entry(label, f"{label} {tuple(p.shape)} {p.dtype}, a plain tensor")
    return Entry(label, describe(opt, p, group, index), ranks if len(ranks) > 1 else ())


def digests(some: list[Entry]) -> Digests:
    texts: dict[tuple[int, ...], list[str]] = {}
    for entry in some:
        texts.setdefault(entry.ranks, []).append(entry.text)
    return {digest(lines): list(ranks) for ranks, lines in texts.items()}


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def arrived(store: Any, places: list[str], peers: list[int]) -> dict[int, str]:
    """Those that have left what they hold, as soon as all have, and where."""
    try:
        store.wait([f"{places[0]}{r}" for r in peers], timedelta(seconds=FIRST))
    except RuntimeError:
        found = ((r, place) for r in peers for place in reversed(places))
        return {r: place for r, place in found if store.check([f"{place}{r}"])}
    return dict.fromkeys(peers, places[0])


def differs(mine: Digests, theirs: Digests, me: int, other: int) -> bool:
    """Whether a rank has something else on the meshes that we both are on."""
    both = {text for text, ranks in theirs.items() if me in ranks}
    return both != {text for text, ranks in mine.items() if other in ranks}


def left(store: Any, place: str, rank: int) -> list[Entry]:
    data = zlib.decompress(bytes.fromhex(store.get(f"{place}{rank}/entries").decode()))
    return [Entry(label, text, tuple(ranks)) for label, text, ranks in json.loads(data)]


def sentence(store: Any, came: dict[int, str], good: list[int], bad: int, me: int) -> str:
    """How the first rank that has what I have, and the first that has not, differ."""
    held_by = {bad: left(store, came[bad], bad)}
    a = me
    for a in (*good, me):  # some may share no mesh with the bad one
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
    return [Entry(x.label, x.text) for x in some if rank in x.ranks]
