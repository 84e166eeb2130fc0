"""`bench/gpu.sh` where there is no GPU: every command it would run is one, in the order it says."""

from __future__ import annotations

import re
import subprocess
import tarfile
from pathlib import Path

import orthonorm.bench
from orthonorm.bench.cases import CASES
from orthonorm.bench.options import matches, parser, requests

SCRIPT = Path(orthonorm.bench.__file__).resolve().parent / "gpu.sh"
TESTS = Path(__file__).with_name("test_gpu.py").read_text()


def commands(folder: Path, *arguments: str) -> tuple[list[list[str]], list[str], int]:
    """What a run asks of Python, which here only notes it; the names of its parts; its status."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{folder}/asked\n')
    python.chmod(0o755)
    asked, work = folder / "asked", folder / "work"
    asked.write_text("")
    work.mkdir(exist_ok=True)
    run = subprocess.run(
        ["bash", str(SCRIPT), str(folder / "out"), *(arguments or ["500"])],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "TMPDIR": str(work)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert not any(work.iterdir())
    lines = [line.split() for line in asked.read_text().splitlines()]
    return (
        lines,
        [line.split(":")[0] for line in run.stdout.splitlines() if "exit" in line],
        (run.returncode),
    )


def archived(folder: Path) -> set[str]:
    """The names in the archive, which is all that a run leaves beside its summary."""
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {"summary.txt", "all.tar.gz"}
    with tarfile.open(out / "all.tar.gz") as archive:
        return set(archive.getnames())


def test_every_command_is_one(tmp_path: Path) -> None:
    asked, parts, _ = commands(tmp_path)
    benches = [words[3:] for words in asked if words[:3] == ["-m", "orthonorm", "bench"]]
    for words in benches:
        options = parser().parse_args(words)
        assert options.device == "cuda" and requests(options)
        assert options.json.parent == options.html.parent
        assert options.json.parent.parent == tmp_path / "work"
    assert len(benches) == sum(name.startswith("bench-") for name in parts) >= 8
    order = [parts.index(p) for p in ("tests-first", "tests-hardware", "build", "bench-graphs")]
    assert order == sorted(order)
    assert any(words[1] == "orthonorm.bench.tune" and words[2] == "--out" for words in asked)
    assert {"./summary.txt", "./build.log"} <= archived(tmp_path)
    assert not any("links" in name for name in archived(tmp_path))
    assert (tmp_path / "out" / "summary.txt").read_text().count("\n") == len(parts)


def test_tests_are_chosen_by_names_that_exist() -> None:
    names = [word.split("(")[0] for word in TESTS.split("def ")[1:] if word.startswith("test_")]
    ids = [f"{name}[{case}]" for name in names for case in CASES]
    chosen = re.findall(r'(?:-k|sanitize \w+ \d+) "([^"$]+)"', SCRIPT.read_text())
    assert len(chosen) >= 5
    for expression in chosen:
        assert any(matches(expression, i) for i in ids)
        for word in re.findall(r"[^\s()]+", expression):
            assert word in ("and", "or", "not") or any(word in i for i in ids), word
    hardware, rest = (e for e in chosen if "waits" in e)
    assert all(matches(hardware, i) != matches(rest, i) for i in ids)


def test_a_later_call_goes_on(tmp_path: Path) -> None:
    """On a machine that has compiled nothing, too, and what an earlier call found is kept."""
    _, parts, _ = commands(tmp_path, "500", "bench-twins")
    assert parts[:2] == ["build", "bench-twins"]
    assert "./bench-small-twins.log" in archived(tmp_path)
    asked, parts, _ = commands(tmp_path, "500", "racecheck-layouts")
    assert parts[0] == "build" and parts[-1] == "synccheck-layouts"
    assert ["setup.py", "-q", "build_ext", "--inplace"] in asked
    assert "./bench-small-twins.log" in archived(tmp_path)
    assert commands(tmp_path, "500", "nothing")[1:] == (["build"], 2)


def test_parts_that_had_no_time_are_named(tmp_path: Path) -> None:
    """A call's own limit ends it, and the summary says where to go on."""
    assert commands(tmp_path, "9")[1] == []
    left = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert left[0] == "machine: no time left" and left[-1] == "synccheck-layouts: no time left"
    commands(tmp_path, "500", "racecheck-layouts")
    assert "no time" not in (tmp_path / "out" / "summary.txt").read_text()


def test_all_parts_fit_half_an_hour() -> None:
    text = SCRIPT.read_text()
    limits = re.findall(r"^(?:FROM=\S+ )?(part|bench|sanitize) [\w-]+ (\d+)", text, re.M)
    assert len(limits) > 20
    assert sum(int(s) * (4 if kind == "sanitize" else 1) for kind, s in limits) < 1800
