"""A test, made once at the first kernel, that Triton can compile and run on this machine."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def probe_kernel(x):
    """Write x <- x + 1."""
    tl.store(x, tl.load(x) + 1.0)


@lru_cache
def failure() -> str:
    """Warn and return the reason in one line if Triton cannot run here; return "" if it can."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    try:
        probe_kernel[(1,)](torch.zeros(1, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler, driver or linker each raises its own
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise  # CUDA forbids to load kernels then, which says nothing of this machine
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"orthonorm: Triton cannot compile here, torch serves: {reason}", stacklevel=2
        )
        return reason
    return ""
