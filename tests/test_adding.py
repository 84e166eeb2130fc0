"""docs/adding.md followed on a copy of the tree: each step done, then the tests of all rows run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "adding.md"
STEP = re.compile(r"^`([^`]+)`, (new|after `([^`\n]+)`):\n\n```\w+\n(.*?)^```", re.M | re.S)
MAPPED = ("kernels", "bench", "examples")
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not run from a checkout")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the page's steps done."""
    copy = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for folder in ("python", "tests", "csrc", *MAPPED):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    for name in MAPPED:  # what setup.py's package map does
        (copy / "python" / "orthonorm" / name).symlink_to(copy / name)
    for name, kind, anchor, text in STEP.findall(PAGE.read_text()):
        path = copy / name
        if kind == "new":
            assert not path.exists(), name
            path.write_text(text)
            continue
        lines = path.read_text().splitlines(keepends=True)
        places = [i for i, line in enumerate(lines) if line.strip() == anchor]
        assert len(places) == 1, f"{name} has {len(places)} lines {anchor!r}"
        lines.insert(places[0] + 1, text)
        path.write_text("".join(lines))
    return copy


def passed(tree: Path, wanted: str, *files: str, library: str = "") -> None:
    code = (
        "import sys, torch, pytest, orthonorm\n"
        f"assert orthonorm.__file__.startswith({str(tree)!r})\n"
        f"if {library!r}: torch.ops.load_library({library!r})\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {wanted!r}, *{files!r}]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tree / "tests", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tree / "python")},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-3_000:]
    assert " passed" in run.stdout


def test_every_block_of_the_page_is_a_step() -> None:
    text = PAGE.read_text()
    assert len(STEP.findall(text)) == len(re.findall(r"^```$", text, re.M))


def test_optimizer(tree: Path) -> None:
    passed(tree, "Lion or has_a_row", "test_optimizers.py", "test_optimizer_contract.py")


def test_optimizer_on_two_ranks(tree: Path, tmp_path: Path) -> None:
    """Its row of distributed_pairs.py alone; test_distributed.py runs them all."""
    case, env = "equal_bits_Lion", {**os.environ, "PYTHONPATH": str(tree / "python")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "distributed_cases.py", str(rank), "2", str(tmp_path)],
            cwd=tree / "tests", env={**env, "CASE": case, "OMP_NUM_THREADS": "1"},
        ) for rank in range(2)
    ]  # fmt: skip
    try:
        codes = [process.wait(300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {case: ""}


def test_op_and_kernel(tree: Path) -> None:
    """The tests compare the kernel, compiled alone, with the definition."""
    if shutil.which("g++") is None:  # the package itself needs none: it falls back on definitions
        pytest.skip("there is no g++ to compile the page's kernel with")
    library, root = tree / "softsign.so", Path(torch.__file__).parent
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{tree / 'csrc'}"]
    flags += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-o", str(library)]
    sources = [str(tree / "csrc" / "cpu" / f"{name}.cpp") for name in ("softsign", "scratch")]
    subprocess.run(["g++", *flags, *sources, "-ltorch_cpu", "-lc10"], check=True)
    passed(tree, "softsign", "test_ops.py", library=str(library))
