"""Triton kernels by Triton's launcher, in a process of its own (`launched.py`)."""

from __future__ import annotations

from pathlib import Path

from test_triton import passes


def test_kernels_by_their_launcher(tmp_path: Path) -> None:
    passes("launched.py", TRITON_CACHE_DIR=str(tmp_path))
