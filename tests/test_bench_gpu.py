"""The benchmark's parts for GPUs where there is none: tuning, graphs, the judge's limit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import orthonorm
import pytest
import torch
from orthonorm import ops
from orthonorm.bench import cuda, environment, judge, timing, tune


@pytest.mark.parametrize(
    ("torchs", "side"), [((2, 2, 2), None), ((2, 1, 0.5), 20), ((0.5, 2, 0.5), 30)]
)
def test_where_torch_is_faster(torchs: tuple[float, ...], side: int | None) -> None:
    sides = (10, 20, 30)
    ours = dict(zip(sides, (1, 1.5, 1), strict=True))
    assert tune.torch_from(ours, dict(zip(sides, torchs, strict=True))) == side


def test_tuning_times_chains_beside_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from orthonorm.kernels import gram_polynomial as kernels

    made: list[torch.Tensor] = []
    monkeypatch.setattr(tune, "seconds_of", lambda call: made.append(call()) or len(made) % 3)
    definition = ops.gram_polynomial.definition  # there is no device for either here
    flat = itertools.chain.from_iterable
    monkeypatch.setattr(kernels, "gram_polynomial", definition)
    monkeypatch.setattr(kernels, "by_products", lambda R, t: definition(R, list(flat(t))))
    assert tune.chain_from(torch.float32, (8, 16, 24), 2, "cpu") == 24  # 1 and 2, 0 and 1, 2 and 0
    for chain, words in zip(made[::2], made[1::2], strict=True):
        torch.testing.assert_close(chain, words)
    table, row = tune.stored("chain", "100")  # another's row by name, here its own to change
    row["torch_from"]["float16"] = 1
    assert table["100"] is row and table["90"]["torch_from"]["float16"] == 257


SHARED = 227 * 1024  # bytes of a block on sm_90


def swept(
    monkeypatch: pytest.MonkeyPatch, op: str, deadline: float, stored: list[object] | None = None
) -> tuple[list[object], list[object]]:
    """What a sweep keeps, and what it measured, where the stored records are the fastest."""
    pytest.importorskip("triton")
    from orthonorm.kernels import configs

    known = configs.records(op, torch.float16, "90") if stored is None else stored
    seen = []

    def seconds(call) -> float:
        record = call()
        seen.append(record)
        side = record.block_m * record.block_n  # each shape is ahead somewhere
        return 2.0 - (record in known) + abs(side - 4096 * len(seen) % 32768) * 1e-9

    monkeypatch.setattr(tune, "launcher", lambda op, side, dtype: lambda record: record)
    monkeypatch.setattr(tune, "seconds_of", seconds)
    monkeypatch.setattr(tune, "torch_seconds", lambda op, side, dtype: 1e3)
    kept, limit = tune.sweep(op, torch.float16, 64, deadline, known, SHARED)
    assert limit is None
    return kept, list(dict.fromkeys(seen))


@pytest.mark.parametrize("op", list(tune.SHAPES))
def test_a_sweep_cut_short_keeps_what_is_stored(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from orthonorm.kernels import configs

    kept, seen = swept(monkeypatch, op, -1.0)
    assert set(seen) == set(configs.records(op, torch.float16, "90")) >= set(kept)
    kept, seen = swept(monkeypatch, op, 1e300)
    assert set(kept) <= set(configs.records(op, torch.float16, "90"))
    sizes = [r.block_m * r.block_n for r in kept]
    assert sizes == sorted(sizes, reverse=True)
    assert len(swept(monkeypatch, op, -1.0, [])[0]) == 1  # something, even so


def test_a_sweep_measures_what_fits_and_stored_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = swept(monkeypatch, "product", 1e300)
    assert {(r.block_m, r.block_n) for r in seen} == {*tune.SHAPES["product"], (128, 64)}
    assert all((r.block_m + r.block_n) * 2 * r.block_k * r.stages <= SHARED for r in seen)
    assert not any((r.block_m, r.block_n, r.stages) == (128, 256, 5) for r in seen)
    _, unknown = swept(monkeypatch, "product", 1e300, [])
    assert unknown[0].warps == 8


def test_tables_are_laid_before_a_call_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy for each, not in a graph, and only while a record is timed."""
    pytest.importorskip("triton")
    from orthonorm.kernels import tables

    own, copies, device = tables.upload, [], torch.device("cuda")
    monkeypatch.setattr(tables, "copied", lambda values, device: copies.append(values) or values)
    with tune.tables_laid():
        assert tables.upload((1, 2), device) is tables.upload((1, 2), device, {})
    assert copies == [(1, 2)] and tables.upload is own


def test_a_graph_is_replayed_for_a_whole_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay of 4 us behind a launch of 20 is not one of 24."""
    graph = type("Graph", (), {"replay": lambda self: None})()
    monkeypatch.setattr(cuda, "captured", lambda call: graph)
    counts = []

    def time_cuda(call: object, repeats: int) -> float:
        counts.append(repeats)
        return 4e-6 + 20e-6 / repeats

    monkeypatch.setattr(cuda, "time_cuda", time_cuda)
    assert cuda.replayed(lambda: None) == 4e-6 + 20e-6 / counts[-1]
    assert counts[-1] == timing.repeats_of(6e-6) > 30


def test_a_gpu_judges_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decompositions in float64 are as slow, and its time is dear."""
    assert judge.LIMITS["cuda"] < judge.LIMITS["cpu"]
    X = torch.randn(3, 4, 6)
    monkeypatch.setitem(judge.LIMITS, "cpu", 2 * 4 * 4 * 6)
    assert len(judge.PolarJudge([X]).factors) == 2


def test_the_source_is_named_where_there_is_no_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(orthonorm, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delenv("ORTHONORM_COMMIT", raising=False)
    assert environment.commit() == ""
    monkeypatch.setenv("ORTHONORM_COMMIT", "abc1234")
    assert environment.commit() == "abc1234"
    assert json.loads(json.dumps(environment.environment()))["commit"] == "abc1234"
