"""The build: sources found by folder, a library without C++ or Python symbols, files of a size."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import orthonorm
import pytest
import torch
from orthonorm import LOADED, OPS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not run from a checkout")


def test_sources_are_named_after_ops() -> None:
    for pattern in ("csrc/cpu/*.cpp", "csrc/cuda/*.cu"):
        for source in ROOT.glob(pattern):
            registered = re.findall(r'm\.impl\("(\w+)"', source.read_text())
            assert registered in ([], [source.stem]), f"{source.name} registers {registered}"
            assert not registered or source.stem in OPS


def test_setup_and_cmake_read_the_same_folders() -> None:
    setup, cmake = (ROOT / "setup.py").read_text(), (ROOT / "CMakeLists.txt").read_text()
    for folder in ("csrc/cpu/*.cpp", "csrc/cuda/*.cu"):
        assert f'glob("{folder}")' in setup
        assert re.search(rf"file\(GLOB \w+ CONFIGURE_DEPENDS {re.escape(folder)}\)", cmake)
    for flag in ("-O3", "-fno-math-errno", "--fmad=false"):
        assert flag in setup and flag in cmake


def test_library_uses_only_the_stable_abi() -> None:
    if LOADED.libraries["_C.so"] != "loaded" or shutil.which("nm") is None:
        pytest.skip("needs _C.so and nm")
    library = Path(orthonorm.__file__).parent / "_C.so"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout.split()
    foreign = [s for s in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)|_?Py[A-Z]", s)]
    assert not foreign, foreign
    assert any(s.startswith(("torch_", "aoti_torch_")) for s in symbols)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_a_wheel_for_cuda_asks_for_its_torch() -> None:
    env = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / ".ci" / "wheel-cuda")]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found
    assert (
        f"must be built for CUDA 13 (make wheel-cuda TORCH=...), got torch {torch.__version__}"
        in found.stderr
    )


def test_version_is_the_changelogs() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading and heading[1] == orthonorm.__version__


def test_files_stay_readable() -> None:
    """400 lines a source file: longer ones are split by meaning."""
    for folder in ("python", "kernels", "bench", "examples", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".cu", ".h"} and "egg-info" not in str(path):
                lines = path.read_text().count("\n")
                assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
