"""Whether Triton can compile and run anything on this machine: asked once, at the first kernel."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def probe_kernel(x):
    tl.store(x, tl.load(x) + 1.0)


@lru_cache
def failure() -> str:
    """Why not, in one line, with a warning; empty if it can."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    try:
        probe_kernel[(1,)](torch.zeros(1, device=device))
    except Exception as error:  # a compiler, a driver, a linker: whatever is missing raises its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"orthonorm: Triton cannot compile here, torch serves: {reason}", stacklevel=2
        )
        return reason
    return ""
