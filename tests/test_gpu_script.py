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
    asked = folder / "asked"
    asked.write_text("")
    run = subprocess.run(
        ["bash", str(SCRIPT), str(folder / "out"), "500", *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)}, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line.split() for line in asked.read_text().splitlines()]
    return (
        lines,
        [line.split(":")[0] for line in run.stdout.splitlines() if "exit" in line],
        (run.returncode),
    )


def test_every_command_is_one(tmp_path: Path) -> None:
    asked, parts, _ = commands(tmp_path)
    benches = [words[3:] for words in asked if words[:3] == ["-m", "orthonorm", "bench"]]
    for words in benches:
        options = parser().parse_args(words)
        assert options.device == "cuda" and options.json.parent.is_dir() and requests(options)
    assert len(benches) == sum(name.startswith("bench-") for name in parts) >= 8
    assert parts.index("tests-first") < parts.index("bench-graphs") < parts.index("build")
    assert any(words[1] == "orthonorm.bench.tune" and words[2] == "--out" for words in asked)
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as archive:
        assert {"./summary.txt", "./build.log"} <= set(archive.getnames())
    assert (tmp_path / "out" / "summary.txt").read_text().count("\n") == len(parts)


def test_tests_are_chosen_by_names_that_exist() -> None:
    names = [word.split("(")[0] for word in TESTS.split("def ")[1:] if word.startswith("test_")]
    ids = [f"{name}[{case}]" for name in names for case in CASES]
    chosen = re.findall(r'-k "([^"]+)"', SCRIPT.read_text())
    assert len(chosen) >= 2
    for expression in chosen:
        assert any(matches(expression, i) for i in ids)
        for word in re.findall(r"[^\s()]+", expression):
            assert word in ("and", "or") or any(word in i for i in ids), word


def test_a_later_call_goes_on(tmp_path: Path) -> None:
    _, parts, _ = commands(tmp_path, "bench-twins")
    assert parts[0] == "bench-twins" and "build" not in parts
    assert commands(tmp_path, "nothing")[1:] == ([], 2)
