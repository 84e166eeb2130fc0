"""The benchmark command: what it prints, writes and refuses, and that it measures fairly."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import orthonorm
import pytest
import torch
from orthonorm import ops
from orthonorm._library import LOADED
from orthonorm.bench import candidates, claims, packages, records, report, shapes, timing
from orthonorm.bench.__main__ import main
from orthonorm.bench.cases import CASES, NAMES, STEPS, Case
from orthonorm.bench.environment import environment, peak_extra_memory
from orthonorm.bench.inputs import DTYPES, LAYOUTS, SPECTRA, Inputs, copied, place
from orthonorm.bench.judge import relative_error
from orthonorm.bench.measure import Request, measure
from orthonorm.bench.timing import Plan, interleave
from torch import Tensor

QUICK = ["--rounds", "3", "--no-ceilings", "--against", "reference", "torch", "floor"]
LIGHT = ("reference", "torch", "floor")


# ---- the command ---------------------------------------------------------------------------------
def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """--list and no arguments name everything there is."""
    for arguments in (["--list"], []):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        for word in (*NAMES, "claims", *SPECTRA, *shapes.MODELS, *DTYPES):
            assert word in printed


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["newton_schulz", "--shape", "3*20x12+2x8x8", "--dtype", "float32", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "newton_schulz  3*20x12+2x8x8  float32  gaussian" in printed
    assert "torch.optim.Muon's function" in printed
    assert f"torch {torch.__version__}" in printed and "threads" in printed
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CSV grows by rows under one header; JSON holds environment and rows of the last run."""
    table, data = tmp_path / "history.csv", tmp_path / "run.json"
    words = ["row_moment_", "magnitude", "--shape", "40x30", "--dtype", "float32", "bfloat16"]
    for _ in range(2):
        assert main([*words, *QUICK, "--csv", str(table), "--json", str(data)]) == 0
    capsys.readouterr()
    found = json.loads(data.read_text())
    assert found["format"] == records.FORMAT
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["orthonorm"] == orthonorm.__version__
    rows = found["records"]
    assert {(r["name"], r["dtype"]) for r in rows} == {
        (n, d) for n in ("row_moment_", "magnitude") for d in ("float32", "bfloat16")
    }
    ours = [r for r in rows if r["kind"] == "ours"]
    assert all(r["median_ms"] > 0 and r["ratio"] == 1.0 and r["error"] < 1e-2 for r in ours)
    assert all(r["p10_ms"] <= r["median_ms"] <= r["p90_ms"] for r in rows)
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(rows)
    assert set(lines[0]) == set(report.COLUMNS)
    assert {line["backend"] for line in lines} == {r["backend"] for r in rows}


def test_row_repeats_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command in a row, run again, measures the same thing."""
    data = tmp_path / "run.json"
    words = ["newton_schulz", "--shape", "9x5", "--spectrum", "log-1e-2", "--precision", "full"]
    assert main([*words, "--dtype", "float32", *QUICK, "--json", str(data)]) == 0
    first = json.loads(data.read_text())["records"]
    start = "python -m orthonorm bench "
    assert first[0]["command"].startswith(start)
    again = first[0]["command"].removeprefix(start).split()
    assert main([*again, *QUICK, "--json", str(data)]) == 0
    second = json.loads(data.read_text())["records"]
    capsys.readouterr()
    keys = ("name", "shape", "dtype", "spectrum", "precision", "backend", "error")
    assert [[r.get(k) for k in keys] for r in first] == [[r.get(k) for k in keys] for r in second]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["grm"], "did you mean gram"),
        (["muonn"], "did you mean muon"),
        (["gram", "--shape", "3xx"], "'3xx'"),
        (["gram", "--shape", "7"], "'7'"),
        (["gram", "--shape", "0*3x3"], "'0*3x3'"),
        (["gram", "--shape", "gpt5"], "gpt2-small"),
        (["gram", "--dtype", "int8"], "'int8'"),
        (["gram", "--spectrum", "flat"], "power-law"),
        (["gram", "--against", "numpy"], "reference"),
        (["gram", "--against", "heavybal"], "heavyball"),
        (["gram", "--sweep", "n=8"], "LOW:HIGH"),
        (["gram", "--shape", "4x5", "--sweep", "n=2:4"], "4x5"),
        (["gram", "-k", "and"], "-k"),
        (["gram", "-k", "nosuchcase"], "--dry-run"),
        (["gram", "--load", "/no/such.json"], "/no/such.json"),
        (["gram", "--compare", __file__], "JSON"),
        (["static", "-k", "nosuchkernel"], "no compiled kernel"),
        (["cluster", "--gbps", "0"], "--gbps"),
        (["gram", "--precision", "full"], "gram"),
        (["newton_schulz", "--precision", "fp8"], "'fp8'"),
        (["adamw", "--precision", "full"], "adamw"),
        (["small_newton_schulz", "--shape", "3x129"], "128"),
        (["gram", "--rounds", "0"], "--rounds"),
        (["gram", "--rounds", "many"], "--rounds"),
        (["gram", "--seconds", "nan"], "--seconds"),
        (["gram", "--device", "tpu"], "'tpu'"),
        (["gram", "--frobnicate"], "--frobnicate"),
        (["gram", "--csv", "/no/such/folder/x.csv"], "/no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence that names what is wrong, exit code 2, nothing measured."""
    assert main(arguments) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("bench: ") and len(caught.err.splitlines()) == 1
    assert word in caught.err


def test_foreign_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    assert main(["gram", "--shape", "3x3", "--csv", str(path)]) == 2
    assert "columns" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


def test_interrupt_keeps_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "run.json"

    def interrupted(request: Request) -> object:
        if request.name == "apply":
            raise KeyboardInterrupt
        return measure(request)

    monkeypatch.setattr("orthonorm.bench.__main__.measure", interrupted)
    words = ["gram", "apply", "--shape", "5x7", "--dtype", "float32", *QUICK]
    assert main([*words, "--json", str(data)]) == 130
    assert {r["name"] for r in json.loads(data.read_text())["records"]} == {"gram"}
    assert "interrupted" in capsys.readouterr().err


# ---- every row of the table ----------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_measured(name: str) -> None:
    """Ours first, with a time and an error within its dtype; no peer fails without a reason."""
    request = Request(name, shapes.parse("2*12x8+8x12+6x6"), plan=Plan(rounds=2), kinds=LIGHT)
    rows = measure(request)
    assert rows[0].kind == "ours" and rows[0].note == ""
    assert rows[0].median_ms is not None and rows[0].rate is not None
    assert rows[0].error is not None and rows[0].error < 1e-2
    assert not [row.note for row in rows if row.note.startswith("failed")]
    same = [row for row in rows if row.kind == "reference"]
    assert all(row.error is not None and row.error < 1e-2 for row in same)


@pytest.mark.parametrize("name", ["nn.hard_cap", "nn.spectral_norm_", "monitor.soft_rank"])
def test_public_items_are_measured(name: str) -> None:
    """Ours beside the formula, each with its error."""
    rows = measure(Request(name, shapes.parse("12x8+6x6"), plan=Plan(rounds=2), kinds=LIGHT))
    assert [row.kind for row in rows] == ["ours", "torch"] and not any(row.note for row in rows)
    assert all(row.median_ms is not None and row.error < 1e-5 for row in rows)


@pytest.mark.parametrize(("asked", "runs"), [("float16", True), ("auto", True), ("float32", False)])
def test_a_package_runs_in_the_dtype_that_was_asked_for(asked: str, runs: bool) -> None:
    """A time in another dtype would stand beside ours as if it were the same work."""
    peer = packages._polynomial("p", "p", "package", lambda a: (torch.neg, torch.float16, True))
    calls = [{"X": [torch.ones(2, 2)], "precision": asked}]
    if runs:
        assert peer.start(CASES["newton_schulz"], calls).dtype == "float16"
    else:
        with pytest.raises(candidates.Unavailable, match="computes in float16 only"):
            peer.start(CASES["newton_schulz"], calls)


@pytest.mark.parametrize("name", ["conda_step_", "muon_step_", "adamw_step_", "decayed_update_"])
def test_peers_compute_the_same(name: str) -> None:
    """torch's own way agrees with ours in float64: the times are of the same thing."""
    request = Request(
        name, shapes.parse("12x8+8x12"), dtype="float64", plan=Plan(rounds=1), kinds=LIGHT
    )
    limit = 2e-2 if name == "muon_step_" else 1e-12  # torch.optim.Muon works in bfloat16
    rows = [row for row in measure(request) if row.kind == "torch"]
    assert rows and all(row.error is not None and row.error < limit for row in rows)


@pytest.mark.parametrize("name", STEPS)
def test_step_peers_compute_the_same(name: str) -> None:
    request = Request(
        name, shapes.parse("12x8+8x12"), dtype="float64", plan=Plan(rounds=1), kinds=LIGHT
    )
    rows = [row for row in measure(request) if row.kind in ("ours", "torch")]
    assert (name in ("muon", "conda", "adamw")) == (len(rows) > 1)
    limit = 3e-2 if name == "muon" else 1e-9  # torch.optim.Muon works in bfloat16
    assert rows and all(row.error is not None and row.error < limit for row in rows), rows


def test_a_wrong_kernel_shows_in_the_error() -> None:
    case = CASES["decayed_update_"]
    (arguments,) = case.calls(shapes.parse("8x8"), Inputs())
    want = case.outputs(arguments, None)
    wrong = {"params": [w * 1.01 for w in want["params"]]}
    error = relative_error(wrong, want)
    assert error is not None and math.isclose(error, 0.01, rel_tol=1e-3)


def test_floor_moves_the_bytes_and_keeps_the_numbers() -> None:
    """row_moment_ reads X, then reads and writes it; rotated_adam_ reads and writes three."""
    for name, per_element in (("row_moment_", 3), ("rotated_adam_", 6), ("column_normalize", 3),
                              ("magnitude", 1), ("muon_prologue_", 4)):  # fmt: skip
        case = CASES[name]
        calls = case.calls(shapes.parse("64x128"), Inputs())
        assert candidates.bytes_moved(case, calls) == per_element * 4 * 64 * 128
        before = [copied(a) for a in calls]
        candidates.start_floor(case, calls).call()
        for a, b in zip(calls, before, strict=True):
            for key in set(a) - set(case.written):
                both = zip(_flat(a[key]), _flat(b[key]), strict=True)
                assert all(torch.equal(x, y) for x, y in both)


def _flat(value: object) -> list[Tensor]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, Tensor)]


# ---- timing --------------------------------------------------------------------------------------
def test_interleave_is_fair() -> None:
    """Every candidate runs equally often, once per round, and each comes first in turn."""
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    fake = timing.SAMPLE
    try:
        timing.SAMPLE = 0.0  # one call per sample
        samples = interleave(calls, Plan(rounds=6))
    finally:
        timing.SAMPLE = fake
    warm = order[:6]
    assert warm == ["a", "a", "b", "b", "c", "c"]
    rounds = ["".join(order[6 + 3 * r : 9 + 3 * r]) for r in range(6)]
    assert rounds == ["abc", "bca", "cab"] * 2
    assert {len(times) for times in samples.values()} == {6}
    assert all(t >= 0 for times in samples.values() for t in times)


def test_plan() -> None:
    assert Plan(rounds=7).choose(100.0) == 7
    assert Plan(seconds=1.0).choose(0.1) == 10
    assert Plan(seconds=1.0).choose(10.0) == Plan().low
    assert Plan(seconds=1.0).choose(0.0) == Plan().high


def test_statistics() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert timing.quantile(values, 0.5) == 3.0
    assert timing.quantile(values, 0.1) == pytest.approx(1.4)
    found = timing.stats(values)
    assert (found.median, found.rounds) == (3.0, 5)
    assert found.drift == pytest.approx(3.0 / 3.0 - 1)
    slowed = [1.0, 10.0, 1.0]  # a neighbour slowed the second round for both
    assert timing.median_ratio([2 * x for x in slowed], slowed) == 2.0
    assert timing.ratio_of_medians([2.0, 2.0, 20.0], [1.0, 1.0, 1.0]) == 2.0


def test_extra_memory_is_counted() -> None:
    """Tensors to the byte; what kernels take beside them: a product packs its operands."""
    assert peak_extra_memory(lambda: torch.empty(2**20).neg_()) == 4 * 2**20
    X = torch.randn(300, 400)
    found = {peak_extra_memory(lambda: ops.gram(X)) for _ in range(3)}
    beside = found.pop() - 4 * 300 * 300
    assert not found
    if LOADED.served.get(("gram", "CPU")) == "C++":
        assert 4 * 300 * 400 <= beside < 4 * 2**20
        u, v = torch.randn(300), torch.randn(400)
        assert peak_extra_memory(lambda: ops.power_iteration_([X], [u], [v])) >= 4 * (300 + 400)
        small, triple = [torch.randn(32, 32)], [3.4445, -4.7750, 2.0315]
        taken = peak_extra_memory(lambda: ops.small_newton_schulz(small, triple, torch.float32))
        assert taken >= 2 * 4 * 32 * 32  # the result and the iterate
    assert peak_extra_memory(lambda: None) == 0


def test_a_conda_step_holds_one_work_buffer() -> None:
    """Of GPT-2's layers, between refreshes: less than one of the largest matrix."""
    case = CASES["conda_step_"]
    calls = case.calls(shapes.parse("768x3072+768x768"), Inputs())
    running = candidates.start_ours(case, calls)
    assert peak_extra_memory(running.call) <= 4 * 768 * 3072


# ---- inputs and shapes ---------------------------------------------------------------------------
def test_parse() -> None:
    assert shapes.parse("64x2048x768").shapes == ((64, 2048, 768),)
    assert shapes.parse("2*3x4+5x6").shapes == ((3, 4), (3, 4), (5, 6))
    assert shapes.describe(((3, 4), (3, 4), (5, 6))) == "2*3x4+5x6"
    small = shapes.parse("gpt2-small")
    assert len(small.shapes) == 48 and small.numel == 84_934_656
    assert len(small.distinct().shapes) == 4


@pytest.mark.parametrize("spectrum", [s for s, values in SPECTRA.items() if values])
def test_spectra(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    assert values is not None
    for shape in ((40, 24), (2, 24, 40)):
        found = torch.linalg.svdvals(Inputs(torch.float64, spectrum=spectrum).matrix("X", shape))
        assert torch.allclose(found, values(24).expand_as(found), atol=1e-12)


def test_inputs_are_reproducible() -> None:
    a, b = (Inputs(seed=3).matrix("X", (5, 6)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, Inputs(seed=4).matrix("X", (5, 6)))
    assert not torch.equal(a, Inputs(seed=3).matrix("Y", (5, 6)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    x = torch.randn(3, 5, 4)
    placed = place(x, layout)
    assert torch.equal(placed, x)
    assert placed.is_contiguous() == (layout == "contiguous")
    twin = copied({"x": placed})["x"]
    assert twin.stride() == placed.stride() and torch.equal(twin, placed)
    assert twin.data_ptr() != placed.data_ptr()


def test_environment_is_json() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads()


def test_claims_say_whether_they_held() -> None:
    claim = claims.Claim("a", 101.0, ">=", 100.0, error=1e-3, other_error=1e-2)
    assert claim.held and "held" in claim.cells()
    assert not claims.Claim("a", 99.0, ">=", 100.0).held
    worse = claims.Claim("a", 200.0, ">=", 100.0, error=2e-2, other_error=1e-2)
    assert worse.held and not replace(worse, exact=True).held
    assert claims.Claim("a", 1.1, "<=", 1.1).held
    assert not claims.Claim("a", math.nan, ">=", 1.0).held
    request = Request("gram", shapes.parse("8x8"), kinds=("torch",), plan=Plan(rounds=2))
    rows = measure(request)
    found = claims.compare(rows, rows[1].backend, "gram", ">=", 0.0)
    assert found.held and found.ours and found.other


def test_served_by_names_the_backend() -> None:
    case: Case = CASES["muon_step_"]
    calls = case.calls(shapes.parse("6x6"), Inputs())
    with orthonorm.reference():
        case.op(**copied(calls[0]))
    label = candidates.served_by(candidates.start_ours(case, calls).call)
    assert set(label.split(" + ")) <= {"C++", "CUDA", "Triton", "reference"}
