"""examples/compare_optimizers.py: the budget's rule, a run end to end, resumption, the README."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from orthonorm.bench import results
from orthonorm.examples import compare_optimizers, compare_states, comparison
from orthonorm.examples.compare_optimizers import FACTOR, PRESETS, next_rate, search
from orthonorm.optim import REGISTRY


def parabola(best: float, seen: list[float]) -> Any:
    def measure(rate: float) -> float:
        seen.append(rate)
        return math.log(rate / best) ** 2

    return measure


@pytest.mark.parametrize("best", [0.01, 0.011, 0.04, 0.27, 0.0013])
def test_the_search_closes_in_on_the_best_rate(best: float) -> None:
    """Five runs from 0.01 reach any optimum within a factor of 27, to a factor of 3 at least."""
    order: list[float] = []
    seen = search(0.01, 5, parabola(best, order))
    assert list(seen) == order and len(set(order)) == 5
    found = min(seen, key=lambda rate: seen[rate])
    assert abs(math.log(found / best)) <= math.log(FACTOR)
    assert found != order[0] or abs(math.log(best / 0.01)) < math.log(FACTOR) / 2


def test_a_rate_that_diverges_is_left_behind() -> None:
    assert next_rate({1.0: math.inf, 3.0: math.inf}) == 1.0 / FACTOR
    assert next_rate({1.0: 2.0, 3.0: math.inf}) == 1.0 / FACTOR
    assert next_rate({1 / 3: 4.0, 1.0: 2.0, 3.0: math.inf}) == pytest.approx(3**-0.5)


def run(out: Path, *names: str) -> dict[str, Any]:
    argv = ["--preset", "smoke", "--out", str(out), "--optimizers", *names]
    assert compare_optimizers.main(argv) == 0
    found: dict[str, Any] = json.loads((out / "optimizers.json").read_text())
    return found


def test_smoke_end_to_end_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan, names = PRESETS["smoke"], ["AdamW", "NorMuon", "ScionLight"]
    found = run(tmp_path, *names[1:])  # AdamW is always in
    assert [r["optimizer"] for r in found["optimizers"]] == names
    adamw = found["optimizers"][0]["settings"]
    for result in found["optimizers"]:
        assert len(result["rates"]) == plan.rates
        tried = {r["lr"]: r["val_loss"] for r in result["rates"] if r["val_loss"] is not None}
        assert result["settings"]["lr"] == min(tried, key=lambda rate: tried[rate])
        assert [r["seed"] for r in result["runs"]] == list(plan.seeds)
        assert result["settings"].get("adamw", adamw) == adamw
        for r in result["runs"]:
            steps, seconds, losses = zip(*r["curve"], strict=True)
            assert steps == (0, 4, 8) and list(seconds) == sorted(seconds)
            assert losses[-1] == r["val_loss"] < losses[0]
    printed = capfd.readouterr().out
    assert (tmp_path / "optimizers.md").read_text() in printed
    assert (tmp_path / "optimizers.png").stat().st_size > 10_000
    before = (tmp_path / "NorMuon.json").stat().st_mtime_ns
    again = run(tmp_path, "NorMuon")
    assert again["optimizers"] == found["optimizers"][:2]
    assert (tmp_path / "NorMuon.json").stat().st_mtime_ns == before


def test_a_folder_of_another_comparison_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "AdamW.json").write_text(json.dumps({"how": {"config": {}}, "result": {}}))
    argv = ["--preset", "smoke", "--out", str(tmp_path), "--optimizers", "AdamW"]
    assert compare_optimizers.main(argv) == 2
    assert "must be of the same config" in capfd.readouterr().err


def result_of(name: str, losses: list[float], diverged: bool = False) -> dict[str, Any]:
    runs = [
        {"val_loss": x, "diverged": diverged, "seconds": 2.0, "optimizer_seconds": 0.5,
         "state_bytes": 800, "curve": [[0, 0.0, 5.0], [10, 1.0, x]]}
        for x in losses
    ]  # fmt: skip
    return {"optimizer": name, "settings": {"lr": 0.02}, "runs": runs}


def test_the_table_ranks_and_the_readme_shows_it(tmp_path: Path) -> None:
    config = {"steps": 10, "batch": 2, "context": 3, "layers": 1, "hidden": 8}
    about = {"seeds": [0, 1], "config": config, "parameters": 100, "text": "text", "device": "cpu",
             "threads": 1, "torch": "2", "date": "today", "rates": "5 runs"}  # fmt: skip
    found = {
        "how": about,
        "optimizers": [
            result_of("AdamW", [3.0, 3.2]),
            result_of("Broken", [9.0], diverged=True),
            result_of("Muon", [2.1, 1.9]),
        ],
    }
    lines = comparison.table(found).splitlines()
    assert lines[2] == "| `Muon` | 2.000 ± 0.100 | 0.02 | 6 | 50.0 | 8.0 |"
    assert lines[3].startswith("| `AdamW` | 3.100 ± 0.100 | 0.02 | 10 |")
    assert lines[4].startswith("| `Broken` | diverged |")
    (tmp_path / "optimizers.json").write_text(json.dumps(found))
    bodies = results.tables(results.runs(tmp_path), tmp_path)
    page = "<!-- table: optimizers -->\nold\n<!-- end of optimizers -->\n"
    assert results.filled(page, bodies) == page.replace("old", "\n".join(lines))
    assert "| `Muon` |" in bodies["some optimizers"] and "Broken" not in bodies["some optimizers"]
    with pytest.raises(ValueError, match="must be one of"):
        results.filled(page.replace("optimizers", "tables"), bodies)


def test_every_optimizer_has_a_default_rate() -> None:
    for name in REGISTRY:
        start, settings = compare_optimizers.settings_of(name, {"lr": 0.1})
        assert start > 0 and settings.get("adamw", {}) == ({} if name == "AdamW" else {"lr": 0.1})


def test_states_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """A row for every storage type: half of float32's state (and a seed), or a quarter."""
    compare_states.main(["--preset", "smoke", "--seeds", "3"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == list(compare_states.STATES)
    sizes = [int(row[3].replace(",", "")) for row in rows]
    assert sizes[1] < sizes[2] < 0.6 * sizes[0] and sizes[3] < 0.3 * sizes[0]
    losses = [row[1] for row in rows]
    assert rows[0][2] == "+0.0000" and all(abs(float(row[2])) < 0.5 for row in rows)
    for loss, row in zip(losses, rows, strict=True):
        assert float(row[2]) == pytest.approx(float(loss) - float(losses[0]), abs=2e-4)
