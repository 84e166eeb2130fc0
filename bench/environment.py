"""Machine, versions and source of a measurement; also peak memory and import times."""

from __future__ import annotations

import ctypes
import datetime
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orthonorm
import torch
from orthonorm._library import LOADED

from .timing import overhead


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; none on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """Return the processor's name, with family and model where a virtual machine hides it."""
    about = _cpuinfo()
    name = about.get("model name", platform.processor() or platform.machine())
    if "cpu family" not in about or any(c.isdigit() for c in name):
        return name
    return f"{name} (family {about['cpu family']}, model {about['model']})"


def _instructions() -> str:
    found = _cpuinfo().get("flags", "").split()
    return " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f in found)


def commit() -> str:
    """Return the commit of the source, with "+" if files differ from it.

    Outside git it is what ORTHONORM_COMMIT says, or "".
    """
    folder = Path(orthonorm.__file__).resolve().parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("ORTHONORM_COMMIT", "")
    return head + ("+" if git("status", "--porcelain", "-uno") else "")


def pinned() -> bool:
    """True if OpenMP was told to keep every thread on one core."""
    return os.environ.get("OMP_PROC_BIND", "false").lower() not in ("", "false")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return the description of machine, versions and source for every result, as JSON data."""
    on_gpu = device.startswith("cuda")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "orthonorm": orthonorm.__version__,
        "commit": commit(),
        "kernels": LOADED.backend,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "pinned": pinned(),
        "harness_us": round(overhead() * 1e6, 3),  # time that timing adds to a call
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def describe(found: dict[str, Any]) -> list[str]:
    """Return the environment as a few lines of text of at most 100 columns."""
    source = f"orthonorm {found['orthonorm']}"
    source += f" ({found['commit']})" if found["commit"] else ""
    lines = [
        f"{found['device']}, {found['cores']} cores, {found['threads']} "
        f"{'pinned ' if found.get('pinned') else ''}threads, {found['instructions']}".rstrip(", "),
        f"{source}, torch {found['torch']}, Python {found['python']}, {found['date']}",
    ]
    if found["load"] is not None and found["load"] > 0.5:
        lines.append(
            f"other work was running (load {found['load']}): read ratios, not times, and run again"
        )
    return [part for line in lines for part in textwrap.wrap(line, 100)]


def _most_held_by_torch(call: Callable[[], Any]) -> int:
    """Return the peak bytes that a call takes from torch's CPU allocator."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate((e["args"]["Bytes"] for e in events), initial=0))


def _most_held_by_kernels(call: Callable[[], Any]) -> int:
    """Return the peak bytes that C++ kernels take in addition to tensors (csrc/scratch.h)."""
    path = Path(orthonorm.__file__).with_name("_C.so")
    if LOADED.libraries.get(path.name) != "loaded":
        call()
        return 0
    counted = ctypes.CDLL(str(path)).orthonorm_scratch
    counted.restype = ctypes.c_int64
    counted()
    call()
    return int(counted())


def peak_extra_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Return the peak bytes that a call takes beyond those held before; a first call warms up.

    The bytes are counted, not sampled, so the number is the same every time. On a CPU the peaks of
    torch's allocator and of the kernels' own memory are added, though they may differ in time.
    """
    call()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    return _most_held_by_torch(call) + _most_held_by_kernels(call)


IMPORT = (
    "import time, torch; start = time.perf_counter(); import orthonorm; "
    "print(time.perf_counter() - start, torch.cuda.is_initialized())"
)


def import_times(rounds: int = 5) -> tuple[list[float], bool]:
    """Time `import orthonorm` after torch in fresh processes.

    Return the seconds, and True if an import initialized CUDA.
    """
    seconds, woke = [], False
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"import orthonorm failed: {done.stderr.strip().splitlines()[-1:]}")
        took, touched = done.stdout.split()
        seconds.append(float(took))
        woke = woke or touched == "True"
    return seconds, woke
