"""Pages in docs/: every Python block runs, in order; every name of orthonorm.nn is shown."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orthonorm.nn
import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
pytestmark = pytest.mark.skipif(not PAGES, reason="not run from a checkout")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S))
    found = {m for b in blocks for m in re.findall(r"^(?:import|from) (\w+)", b[1], re.M)}
    if missing := sorted(m for m in found if find_spec(m) is None):
        pytest.skip(f"{missing} not installed: make frameworks")
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks:
        before = text[: block.start(1)].count("\n")  # so that a traceback has the page's lines
        exec(compile("\n" * before + block[1], str(page), "exec"), names)


def test_names_of_nn_are_shown() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    kinds = {"SpectralNorm", "SigmaReparam", "StableRank", "SpectralRescaling", "LipschitzReport"}
    missing = [n for n in set(orthonorm.nn.__all__) - kinds if not re.search(rf"\b{n}\b", text)]
    assert not missing
