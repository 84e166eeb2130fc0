"""Triton kernels compiled ahead of time for GPUs that are not here, and what the binaries need.

The committed report (`bench/results/triton_compile.json`, all architectures) must cover every
launch the package may make; Hopper's are compiled again here and held to the same rules.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if sys.platform != "linux":  # there the dev extra installs it, and its absence is an error
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

from orthonorm.bench import triton_report as report
from orthonorm.bench.triton_builds import ARCHES, Build, builds, module
from orthonorm.kernels import configs

PATH = Path(report.__file__).parent / "results" / "triton_compile.json"
ROWS: dict[str, dict[str, Any]] = {row["name"]: row for row in json.loads(PATH.read_text())}
BUILDS = [build for arch in ARCHES for build in builds(arch)]
# Two registers too few, ptxas of Triton 3.9, 2026-11: LLVM keeps the iterate in float32, which
# these ends want, through the loop beside the half type the products want; 16 warps spill 700 times
SPILLS = {
    f"small_{op}-{dtype}-128x128-sm_80": 8
    for op in ("normuon", "normuon-tall", "muon-rounded")
    for dtype in ("float16", "bfloat16")
}


def bounded(build: Build) -> bool:
    """Whether offsets within a tile fit 32 bits: by `View.aligned`, dense, or by sides of at most
    256."""
    aligned = build.constants.get("ALIGNED") or build.constants.get("FLAT")
    return bool(aligned) or build.op in ("small_gram_polynomial", "gram_chain")


def check(build: Build, row: dict[str, Any]) -> None:
    """No spills but for tensors of any strides, whose offsets are of 64 bits; tensor cores in
    products, memory within limits."""
    assert not build.wide or row["spills"] <= SPILLS.get(build.name, 0), row
    assert row["shared"] <= report.SHARED[build.arch], row
    assert row["vectorized"] or not build.wide, row
    if not bounded(build):
        assert row["narrow_offsets"] == 0, row
    if build.tensor_cores:
        assert row["tensor_core_instructions"] > 0, row
        if not build.op.startswith("small"):  # tiles of 16 have only the older instructions
            assert row["newest_instructions"] > 0, row


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_report(build: Build) -> None:
    check(build, ROWS[build.name])


def test_report_has_no_other_rows() -> None:
    assert set(ROWS) == {build.name for build in BUILDS}


def test_every_kernel_is_compiled_for_any_offsets() -> None:
    """The probe's, of one element, aside; where offsets are of 64 bits, in bfloat16."""
    folder = Path(configs.__file__).parent
    modules = [module(path.stem) for path in folder.glob("*.py") if path.stem != "__init__"]
    found = {name for m in modules for name in vars(m) if name.endswith("_kernel")}
    limited = {"probe_kernel", "polynomial_kernel", "chain_kernel"}
    for arch in ARCHES:
        free = [b for b in BUILDS if b.arch == arch and b.dtype == "bfloat16" and not bounded(b)]
        assert {b.kernel.__name__ for b in free} | limited == found
        assert limited - {"probe_kernel"} <= {b.kernel.__name__ for b in BUILDS if b.arch == arch}


HOPPER = [b for b in BUILDS if b.arch == "90" and b.dtype == "bfloat16" and b.wide]
# the largest tile of every launch: records come so, blocks on chip the other way round
RECOMPILED = list({b.op: b for b in sorted(HOPPER, key=lambda b: b.tile)}.values())


@pytest.mark.parametrize("build", RECOMPILED, ids=lambda b: b.name)
def test_compiles(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the report says, or better for another compiler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check(build, report.compiled(build))


def test_table_rules() -> None:
    """Records of a dtype share block_k: results do not depend on which is picked."""
    for path in configs.FOLDER.glob("*.json"):
        for arch, row in configs.load(path.stem).items():
            for dtype, records in row.records.items():
                assert len({r.block_k for r in records}) == 1, (path.stem, arch, dtype)
                for r in records:
                    assert max(r.block_m, r.block_n) <= 512 and r.warps in (4, 8)
                    assert path.stem != "symmetric" or r.block_m == r.block_n


def test_torch_where_it_is_the_better_choice() -> None:
    """Large products in float32 without tensor cores; with them, and of halves, ours."""
    import torch

    limit = configs.row("product", "90").torch_from["float32"]
    assert configs.records("product", torch.float32, "90", limit - 1)
    assert not configs.records("product", torch.float32, "90", limit)
    assert configs.records("product", torch.float16, "90", limit)
    assert configs.records("symmetric", torch.float32, "90", limit)
    torch.set_float32_matmul_precision("high")
    try:
        assert configs.precision(torch.float32) == "tf32"
        assert configs.precision(torch.float16) == "ieee"
        assert configs.records("product", torch.float32, "90", limit)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_architectures_without_a_row() -> None:
    """The nearest older one's, another's by name, or torch."""
    import torch

    rows = [configs.row("product", arch) for arch in ("80", "86", "103", "120", "121")]
    eighty, ninety = (configs.row("product", arch) for arch in ("80", "90"))
    assert rows == [eighty, eighty, ninety, eighty, eighty]
    assert not configs.records("product", torch.float16, "75")
    assert not configs.records("product", torch.float16, "gfx90a")


def test_amd_architectures_have_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = SimpleNamespace(
        major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    cuda = torch.device("cuda", 0)
    assert configs.device_of.__wrapped__(cuda) == ("94", 304)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert configs.device_of.__wrapped__(cuda) == ("gfx942", 304)


@pytest.mark.parametrize(
    ("batch", "side", "block"), [(1, 1024, 64), (1, 2048, 64), (12, 768, 128), (1, 4096, 128)]
)
def test_tiles_fill_a_hopper(
    batch: int, side: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tile with the least work for the busiest of 132 multiprocessors: a symmetric product."""
    import torch

    monkeypatch.setattr(configs, "device_of", lambda device: ("90", 132))
    choices = configs.records("symmetric", torch.float16, "90")

    def tiles(record: configs.Config) -> int:
        down = -(-side // record.block_m)
        return batch * down * (down + 1) // 2

    record = configs.pick(choices, torch.device("cuda"), tiles)
    assert record.block_m == block and tiles(record) >= 132
