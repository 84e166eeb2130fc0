"""Optimizers on 2 and 4 gloo ranks against one process, bit for bit.

Ranks start once per world size and run all cases (distributed_cases.py); a test reads a case's
outcome on every rank.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_cases as cases
import distributed_layouts as layouts
import distributed_pairs as pairs
import pytest
import torch
import torch.distributed as dist
from orthonorm import optim
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

TIMEOUT = 900  # seconds; ranks that hang end by the backend's own, the others may be slow


def start(world: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    folder.mkdir()
    command = [sys.executable, str(Path(cases.__file__))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = range(world)
    return [
        subprocess.Popen(
            [*command, str(r), str(world), str(folder)],
            env=env, stdout=(folder / f"{r}.log").open("wb"), stderr=subprocess.STDOUT,
        ) for r in ranks
    ]  # fmt: skip


def finish(folder: Path, ranks: list[subprocess.Popen[bytes]]) -> list[dict[str, str]]:
    try:
        for process in ranks:
            process.wait(TIMEOUT)
    finally:
        for process in ranks:
            process.kill()
    logs = [(folder / f"{r}.log").read_text() for r in range(len(ranks))]
    files = [folder / f"{r}.json" for r in range(len(ranks))]
    assert all(f.exists() for f in files), logs
    return [json.loads(f.read_text()) for f in files]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[int, list[dict[str, str]]]:
    """Results of worlds 4 and 2, one after the other: two load what four have saved."""
    found = {}
    for world, codes in ((4, [0, 0, 0, 0]), (2, [0, -signal.SIGKILL])):
        ranks = start(world, root / str(world))
        found[world] = finish(root / str(world), ranks)
        assert [p.returncode for p in ranks] == codes
    return found


@pytest.mark.parametrize(
    "name, world", [(name, w) for name, worlds in cases.WORLDS.items() for w in worlds]
)
def test_ranks(name: str, world: int, outcomes: dict[int, list[dict[str, str]]]) -> None:
    results = outcomes[world]
    if name.startswith("z_"):
        results = results[:1]  # rank 1 is dead
    assert [r.get(name, "did not end") for r in results] == [""] * len(results)


@pytest.mark.usefixtures("outcomes")
def test_checkpoint_of_four_ranks_resumes_on_one(root: Path) -> None:
    torch.manual_seed(0)
    model, plain = layouts.Net(), layouts.Net()
    opt, twin = (layouts.optimizer_of("NorMuon", m) for m in (model, plain))
    cases.resume(root, model, opt, twin)
    layouts.train(model, range(2, 4), 0, opt, twin)
    pairs.same(opt, twin)


def test_cuts_that_no_owner_can_collect_are_refused() -> None:
    """A mesh of some ranks only, cut twice; a strided cut of a dimension that nothing else cuts."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("a", "b", "c"))
        some, other = mesh["a", "b"], mesh["a"]
        for label, of, places, words in (
            (
                "twice",
                some,
                [Shard(0), Shard(1)],
                "one mesh dimension, or on a mesh of all 8 ranks",
            ),
            ("strided", other, [_StridedShard(0, split_factor=2)], "all mesh dimensions it is str"),
        ):
            part = torch.ones(4, 3) if label == "twice" else torch.ones(4, 6)
            p = DTensor.from_local(part, of, places, run_check=False, shape=(8, 6), stride=(6, 1))
            with pytest.raises(ValueError, match=f"Muon: parameter '{label}' must be .*{words}"):
                optim.Muon([(label, nn.Parameter(p))])
    finally:
        dist.destroy_process_group()


def test_a_process_without_ranks_imports_no_dtensor() -> None:
    code = "import sys, orthonorm.optim; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_optimizer_is_followed() -> None:
    followed = {cls.__name__ for cls, _ in pairs.OPTIMIZERS.values()}
    assert set(optim.REGISTRY) - {"AdamW"} == followed  # AdamW has no matrices
