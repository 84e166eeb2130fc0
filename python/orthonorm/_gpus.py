"""Check, without initializing CUDA, that `_C_cuda.so` has code for the GPUs of this machine."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

Capability = tuple[int, int]


def built_for(path: Path) -> str:
    """Return the build note of a library (setup.py and csrc/cuda/op.h write it), or "".

    For example " (built for torch 2.13.0, CUDA 13.0, sm 8.0 9.0)".
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        note = re.search(rb"orthonorm built for: ([^;\0]*);", content)
        return f" (built for {note[1].decode()})" if note else ""


def covers(architecture: str, capability: Capability) -> bool:
    """True if code for an architecture runs on a GPU of this compute capability.

    The architecture is written as in TORCH_CUDA_ARCH_LIST: "8.0", "12.0+PTX", or
    "9.0a", which runs on 9.0 alone.
    """
    number, *marks = re.split(r"(a|\+PTX)", architecture)
    major, minor = number.split(".")
    own = int(major), int(minor)
    if "a" in marks:
        return own == capability
    return own <= capability and ("+PTX" in marks or own[0] == capability[0])


def unfit(path: Path) -> str:
    """Return why the library cannot serve a GPU of this machine, or "" if it can."""
    text = built_for(path)
    architectures = re.findall(r"\d+\.\da?(?:\+PTX)?", text.rpartition(" sm ")[2])
    for capability in capabilities() if " sm " in text else []:
        if not any(covers(a, capability) for a in architectures):
            name = ".".join(map(str, capability))
            return f"it has no code for a GPU of compute capability {name}{text}"
    return ""


def capabilities() -> list[Capability]:
    """Return the compute capabilities of the GPUs, by NVML; an empty list without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    gpus: list[Capability] = []
    count, major, minor = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlInit_v2() != 0:
        return gpus
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for i in range(count.value):
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)) != 0:
            continue
        numbers = ctypes.byref(major), ctypes.byref(minor)
        if nvml.nvmlDeviceGetCudaComputeCapability(device, *numbers) == 0:
            gpus.append((major.value, minor.value))
    nvml.nvmlShutdown()
    return gpus
