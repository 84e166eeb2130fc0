"""The benchmark's outputs: what they are made of, and that they catch a slow and a wrong kernel."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from orthonorm import OPS
from orthonorm.bench import (
    ceilings,
    cluster,
    compare,
    figures,
    judge,
    models,
    page,
    records,
    results,
    sass,
    shapes,
    static,
    sweep,
    timing,
)
from orthonorm.bench.__main__ import main
from orthonorm.bench.options import matches, parser, requests
from orthonorm.bench.records import Record, Run

BASE = ["decayed_update_", "--shape", "64x64", "--dtype", "float32", "--no-ceilings"]
RECORD = Record(
    "gram", "8x8", "float32", "C++", "ours", median_ms=2.0, p10_ms=1.9, p90_ms=2.1, rounds=9,
    drift=0.0, ratio=1.0, flops=1e6, bytes=1e4, ceiling="float32", of_ceiling=0.5, error=1e-7,
    command="python -m orthonorm bench gram",
)  # fmt: skip
ENVIRONMENT = {
    "date": "2026-11-25T00:00:00+00:00", "orthonorm": "0", "commit": "c", "torch": "2", "cores": 2,
    "threads": 2, "device": "a CPU", "python": "3", "system": "s", "load": 0.0,
}  # fmt: skip


def run_of(*rows: Record) -> Run:
    return Run(dict(ENVIRONMENT), {"copy": 1e10, "float32": 1e12}, list(rows))


# ---- the two catches -----------------------------------------------------------------------------
def measured(path: Path, *more: str) -> int:
    return main([*BASE, "--against", "torch", "--rounds", "15", "--json", str(path), *more])


def test_a_slowed_kernel_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel made many times slower fails --compare, by name; the peer beside it does not."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert measured(before) == 0
    op = OPS["decayed_update_"]
    whole = op.overload

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(2e-3)
        return whole(*args, **kwargs)

    slowed._schema = whole._schema  # type: ignore[attr-defined]
    monkeypatch.setattr(op, "overload", slowed)
    capsys.readouterr()
    assert measured(after, "--compare", str(before)) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^slower decayed_update_ 64x64.*C\+\+|^slower decayed_update_", printed, re.M)
    assert "1 of ours slower" in printed


def test_a_wrong_kernel_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that is off by 0.1 % shows it in the error column, and fails --compare."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert measured(before) == 0
    op = OPS["decayed_update_"]
    whole = op.overload

    def wrong(params: Any, *args: Any, **kwargs: Any) -> None:
        whole(params, *args, **kwargs)
        for w in params:
            w.mul_(1.001)

    wrong._schema = whole._schema  # type: ignore[attr-defined]
    monkeypatch.setattr(op, "overload", wrong)
    capsys.readouterr()
    assert measured(after, "--compare", str(before), "--threshold", "100000") == 1
    assert re.search(r"^wrong +decayed_update_", capsys.readouterr().out, re.M)
    (ours,) = (r for r in records.load(after).records if r.kind == "ours")
    assert ours.error is not None and 5e-4 < ours.error < 2e-3


def test_comparison_knows_noise() -> None:
    """Beyond the threshold, but inside the other run's p10 to p90: noise. Beyond both: a move."""
    inside = replace(RECORD, median_ms=2.2, p10_ms=1.95, p90_ms=2.4)
    beyond = replace(RECORD, median_ms=2.4, p10_ms=2.3, p90_ms=2.5)
    for new, what in ((inside, "noisy"), (beyond, "slower"), (replace(RECORD), None)):
        moved = compare.move(new, RECORD, 0.05)
        assert (moved and moved.what) == what
    faster = compare.move(RECORD, beyond, 0.05)
    assert faster is not None and faster.what == "faster" and not faster.failed
    gone = compare.move(Record(*("gram", "8x8", "float32", "C++", "ours")), RECORD, 0.05)
    assert gone is not None and gone.failed
    peer = compare.move(replace(beyond, kind="torch"), replace(RECORD, kind="torch"), 0.05)
    assert peer is not None and not peer.failed
    other = run_of(RECORD)
    other.environment["device"] = "another CPU"
    with pytest.raises(ValueError, match="device"):
        compare.check_comparable(run_of(RECORD), other)


# ---- records and files ---------------------------------------------------------------------------
def test_a_run_reads_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    written = run_of(RECORD, replace(RECORD, backend="torch", kind="torch", note="why"))
    written.save(path)
    assert records.load(path) == written
    assert not list(tmp_path.glob("*.partial"))
    for text, word in (
        ("{}", "format"),
        ("[", "JSON"),
        ('{"format": "orthonorm-bench-2"}', "damag"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=word):
            records.load(path)


def test_outputs_are_made_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--load gives the same table as measuring, and every file without measuring."""
    path = tmp_path / "run.json"
    words = ["newton_schulz", "--shape", "nx12", "--sweep", "n=4:16", "--dtype", "float32"]
    words += ["--rounds", "3", "--against", "torch", "reference", "--no-ceilings"]
    assert main([*words, "--json", str(path)]) == 0
    first = capsys.readouterr().out
    names = ("md", "html", "csv")
    outputs = [w for n in names for w in (f"--{n}", str(tmp_path / f"out.{n}"))]
    assert main(["--load", str(path), *outputs, "--plots", str(tmp_path / "plots")]) == 0
    again = capsys.readouterr().out
    tables = first[first.index("newton_schulz  4x12") :]
    assert tables == again and "time ~ n^" in again
    assert (tmp_path / "out.md").read_text().count("### newton_schulz") == 3
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 3 * 3
    assert {p.name for p in (tmp_path / "plots").iterdir()} >= {"errors.png", "sweep.png"}
    assert main(["--load", str(path), "--compare", str(path)]) == 0  # nothing moved


def test_page_is_one_whole_file() -> None:
    """Well-formed, with every plot and row in it, and nothing fetched."""
    peer = replace(RECORD, backend="torch <mm>", kind="torch", median_ms=6.0, ratio=3.0, error=1e-3)
    memory = replace(RECORD, name="magnitude", flops=0.0, ceiling="memory")
    text = page.page([run_of(RECORD, peer, memory, replace(RECORD, sweep="n=4"),
                             replace(RECORD, sweep="n=8", median_ms=4.0))])  # fmt: skip
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", text) and "<script" not in text
    body = text[text.index("<body>") : text.index("</html>")]
    tree = ElementTree.fromstring(body)
    assert len(tree.findall(".//svg")) == 5
    assert "torch &lt;mm&gt;" in text and text.count("<code>python -m") == 4
    titles = " ".join(t.text or "" for t in tree.iter("title"))
    assert "gram 8x8 float32 torch <mm>: 6 ms, 1.0e-03" in titles


def test_roofline_meets_its_ceilings() -> None:
    (line,) = figures.roofline(run_of(RECORD)).lines
    assert line.label == "float32" and line.points[1] == (100.0, 1e12)  # 1e12 FLOP/s over 1e10 B/s


def test_results_match_their_files() -> None:
    """The index page and the README's tables say what bench/results says."""
    for path, text in results.written():
        assert path.read_text() == text, f"{path.name}: run `python -m orthonorm bench results`"


def test_processes_are_pinned_and_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    words = [*BASE, "--against", "torch", "--rounds", "2", "--processes", "1", "--json", str(path)]
    assert main(words) == 0
    found = records.load(path)
    assert found.environment["pinned"] and found.environment["processes"] == 1
    assert [r.rounds for r in found.records] == [2, 2]
    slow = run_of(replace(RECORD, median_ms=3.0, p10_ms=2.8, p90_ms=3.3))
    (joined,) = records.joined([run_of(RECORD), slow]).records
    assert (joined.median_ms, joined.p10_ms, joined.p90_ms) == (2.5, 1.9, 3.3)
    assert joined.drift == 0.5 and joined.noisy


def test_passes_visit_all_again_and_flag_what_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine does that is slower for one row when it comes back."""
    visits: list[tuple[str, bool]] = []

    def measured(request: Any) -> list[Record]:
        visits.append((request.workload.name, request.refcheck))
        again = len(visits) > 2 and request.workload.name == "2x2"
        slow = replace(RECORD, median_ms=2.2, p10_ms=2.15, p90_ms=2.25) if again else RECORD
        return [replace(slow, shape=request.workload.name, error=1e-7 if len(visits) < 3 else None)]

    monkeypatch.setattr("orthonorm.bench.__main__.measure", measured)
    path = tmp_path / "run.json"
    words = ["gram", "--shape", "1x1", "2x2", "--dtype", "float32", "--no-ceilings"]
    assert main([*words, "--passes", "2", "--json", str(path)]) == 0
    assert visits == [("1x1", True), ("2x2", True), ("1x1", False), ("2x2", False)]
    same, moved = records.load(path).records
    assert not same.noisy and moved.noisy and (moved.median_ms, moved.error) == (2.1, 1e-7)
    assert capsys.readouterr().out.split("between passes:")[1].count("2x2") > 0


# ---- measuring -----------------------------------------------------------------------------------
def test_harness_adds_little() -> None:
    """No more than 2 us per call lie between the clock readings and the call."""
    assert timing.overhead() < 2e-6


def test_slow_candidates_run_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_cpu", lambda call, repeats: call())  # not this machine's mood
    plan = timing.Plan(seconds=0.02)
    samples = timing.interleave({"a": lambda: 1e-4, "b": lambda: 0.02}, plan)
    assert len(samples["b"]) == timing.FEW < len(samples["a"])


def test_drift_is_noise() -> None:
    found = timing.stats([1.0] * 10 + [1.1] * 10)
    assert found.drift == pytest.approx(0.1)
    assert replace(RECORD, drift=found.drift).noisy and not RECORD.noisy


def test_ceilings_bind() -> None:
    limits = ceilings.measured("cpu", 0, small=True)
    assert set(limits) == {"copy", "float32", "bfloat16", "float64"} and min(limits.values()) > 0
    known = {"copy": 1e10, "float32": 1e12, "bfloat16": 4e12}
    assert ceilings.allowed(4e12, 1e8, "fastest", known) == ("bfloat16", 1.0)
    assert ceilings.allowed(1e9, 1e10, "float32", known) == ("memory", 1.0)
    assert ceilings.allowed(1e9, 1e10, "float32", {}) == ("", 0.0)


def test_judge_knows_the_polar_factor() -> None:
    X = torch.randn(2, 6, 9, dtype=torch.float64)
    X[1, 3:] = X[1, :3]  # rank 3
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    judged = judge.PolarJudge([X])
    kept = (S > 1e-10).to(X.dtype)
    exact = judged([(U * kept[:, None]) @ Vh])
    assert exact is not None and exact.polar_error < 1e-12 and exact.sigma_max == pytest.approx(1)
    half = judged([0.5 * (U * kept[:, None]) @ Vh])
    assert half is not None and half.polar_error == pytest.approx(0.5)
    assert judged([X * torch.nan]) is None


def test_absent_and_failing_peers_are_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package that is not there, and one that raises, say so in their rows; the rest is kept."""
    (tmp_path / "heavyball").mkdir()
    (tmp_path / "heavyball" / "__init__.py").write_text("raise OSError('no library')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "dion", None)
    monkeypatch.delitem(__import__("sys").modules, "heavyball", raising=False)
    path = tmp_path / "run.json"
    words = ["newton_schulz", "--shape", "4x6", "--dtype", "float32", "--rounds", "1"]
    words += ["--against", "heavyball", "dion", "--no-ceilings", "--json", str(path)]
    assert main(words) == 0
    notes = {r.backend: r.note for r in records.load(path).records}
    assert "no library" in notes["heavyball"] and "github.com" in notes["dion"]
    assert "heavyball: cannot be imported" in capsys.readouterr().out


# ---- what is asked for ---------------------------------------------------------------------------
def test_filter_and_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert matches("gram and not (poly or bf)", "gram-8x8") and not matches("gram", "apply-8x8")
    assert main(["--dry-run", "-k", "muon and llama"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("muon" in x and "llama" in x and "python -m" in x for x in lines)
    quick = requests(parser().parse_args(["--quick"]))
    assert len({r.name for r in quick}) == len(quick)
    assert not {"exact", "compiled"} & set(quick[0].kinds)


def test_sweeps() -> None:
    assert sweep.parse("n=64:1000").values == (64, 128, 256, 512)
    assert sweep.parse("b=1:5:2").values == (1, 3, 5)
    assert sweep.substitute("12*nx4n+n2xn", "n", 8) == "12*8x32+n2x8"
    found = sweep.fit([(2.0, 8.0), (4.0, 64.0), (8.0, 512.0)])
    assert found is not None and found.exponent == pytest.approx(3) and found.r2 == pytest.approx(1)
    asked = ["gram", "--sweep", "threads=1:2", "--dtype", "float32"]
    assert [r.threads for r in requests(parser().parse_args(asked))] == [1, 2]


def test_models_have_their_parameters() -> None:
    """Counts of the matrices alone, from the papers' totals less embeddings (B1.7 for LLaMA)."""
    millions = {name: shapes.MODELS[name].numel / 1e6 for name in shapes.MODELS}
    for name, expected in {
        "gpt2-small": 84.9, "gpt2-medium": 302, "llama-7b": 6476, "llama3-8b": 6979,
        "qwen3-30b-a3b": 29_897, "vit-b": 85.5, "resnet50": 23.45, "llama-60m": 25.3,
    }.items():  # fmt: skip
        assert millions[name] == pytest.approx(expected, rel=2e-3), name
    assert len(models.SHAPES["rl-net"]) == 126
    assert models.SHAPES["deepseek-experts"][0] == (8, 2048, 7168)


def test_cluster_model() -> None:
    """One device: no communication. Many: the largest matrix bounds the step; volumes fit."""
    owned = cluster.matrices(shapes.parse("4*64x64+8x64x128"))
    assert len(owned) == 12
    rates = dict.fromkeys(owned, 1e9)
    machine = cluster.Machine(rates, 1e9, 1e12, 1e9, 0.0)
    alone, many = (cluster.owner(owned, p, machine) for p in (1, 4096))
    assert alone.communication == 0.0
    assert alone.compute == pytest.approx(sum(x.flops for x in owned) / 1e9)
    assert many.compute == pytest.approx(max(x.flops for x in owned) / 1e9)
    moved = 2 * 2 * 64 * 128 * 4095 / 4096  # there and back, 2 bytes an element
    assert many.communication == pytest.approx(moved / 1e9)
    slow = machine._replace(link=1.0)
    assert cluster.crossing([(p, cluster.owner(owned, p, slow)) for p in cluster.DEVICES]) == 2


def test_static_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    """Occupancy and waves by the guide's arithmetic; the report covers every product's case."""
    kernel = static.Kernel(
        "Triton", "k", "gram", "90", "bfloat16", (64, 64, 64), 4, 117, 80 * 1024, 0, {}
    )
    device = static.DEVICES["90"]
    assert kernel.resident(device) == 2  # 228 KiB over 81
    assert kernel.occupancy(device) == 2 * 128 / 2048
    (launch,) = static.launches([kernel], "gram", "768x3072")
    assert launch.tiles == 12 * 13 // 2 and launch.waves == pytest.approx(78 / 264)
    assert launch.efficiency == pytest.approx(768 * 769 / (78 * 2 * 64 * 64))
    assert main(["static", "-k", "gram and sm_90", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "H100 SXM" in printed and "gram-bfloat16-128x128x64-sm_90" in printed
    assert main(["static", "-k", "column_moment_ and sm_90", "--dtype", "bfloat16"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {"CUDA", "Triton"} == {line[2] for line in lines if line[:1] == ["column_moment_"]}
    assert sass.mix("/*0010*/  @P0 HGMMA.64x64 R1 ;\n /*0020*/ LDG.E R2 ;\n /*0030*/ NOP ;") == {
        "tensor": 1, "global": 1
    }  # fmt: skip


def test_results_folder_is_json() -> None:
    """Every file in bench/results reads: runs as runs, compile reports as lists of rows."""
    assert results.runs()
    for path in results.FOLDER.glob("*_compile.json"):
        assert isinstance(json.loads(path.read_text()), list)
