"""Wheel build: the package map, and the compiled libraries from folder globs.

Every csrc/cpu/*.cpp goes into _C.so, every csrc/cuda/*.cu into _C_cuda.so: where torch is a CUDA
build and nvcc is there, for the GPUs of this machine or those that TORCH_CUDA_ARCH_LIST names.
ORTHONORM_PURE=1 builds neither and imports no torch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from glob import glob

from setuptools import find_packages, setup

PACKAGE_DIR = {
    "": "python",
    "orthonorm.kernels": "kernels",
    "orthonorm.bench": "bench",
    "orthonorm.examples": "examples",
}

# Formulas say fma where they mean it (csrc/host_device.h); 20013, 20015 are about torch's headers.
NVCC_FLAGS = [
    "-O3", "-std=c++20", "-DUSE_CUDA", "--fmad=false", "-Xcompiler=-fvisibility=hidden",
    "-diag-suppress=20013,20015",
]  # fmt: skip


def architectures() -> str:
    """What TORCH_CUDA_ARCH_LIST says, else the GPUs of this machine: "" where there are none."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        import torch

        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{a}.{b}" for a, b in sorted(found))
    return os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")


def toolkit_libraries(cuda_home: str) -> list[str]:
    """Where nvcc itself looks for libraries: the one on PATH may be a script of another folder."""
    command = [os.path.join(cuda_home, "bin", "nvcc"), "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    return re.findall(r'"-L([^"]+)"', said)


def compiled() -> dict:
    """setup() arguments for the native libraries; empty for a pure build."""
    if os.environ.get("ORTHONORM_PURE") == "1" or importlib.util.find_spec("torch") is None:
        return {}
    if sys.platform != "linux":
        print(f"orthonorm: no compiled kernels on {sys.platform}: definitions in torch serve")
        return {}
    import torch
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Libraries without Python symbols: one file serves every Python version.

        Objects in ORTHONORM_OBJECTS, if it is set, are there for the next build.
        """

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = os.environ.get("ORTHONORM_OBJECTS") or self.build_temp

        def get_export_symbols(self, ext):
            return []

        def get_ext_filename(self, fullname):
            return fullname.replace(".", "/") + ".so"

    class Wheel(bdist_wheel):
        """py3-none-<platform>: tied to a platform, not to a Python."""

        def finalize_options(self):
            super().finalize_options()
            self.root_is_pure = False

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    # -fno-math-errno lets sqrt vectorize; nothing else is relaxed. -g0: Python asks for -g, which
    # made 56 MB of a library of 4.5.
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden"]
    common = {"include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    extensions = [
        CppExtension(
            "orthonorm._C", sorted(glob("csrc/cpu/*.cpp")), extra_compile_args=flags, **common
        )
    ]
    if torch.version.cuda is None:
        why = "this torch is a CPU build"
    elif CUDA_HOME is None:
        why = "there is no nvcc (CUDA_HOME)"
    elif not (names := architectures()):
        why = "there is no GPU; TORCH_CUDA_ARCH_LIST would name those to build for"
    else:
        why = f"torch {torch.__version__}, CUDA {torch.version.cuda}, sm {names}"
        built_for = f'-DORTHONORM_BUILT_FOR="{why}"'
        extensions.append(
            CUDAExtension(
                "orthonorm._C_cuda",
                sorted(glob("csrc/cuda/*.cu")),
                extra_compile_args={"cxx": flags, "nvcc": [*NVCC_FLAGS, built_for]},
                library_dirs=toolkit_libraries(CUDA_HOME),
                **common,
            )
        )
    print(f"orthonorm: building {', '.join(e.name for e in extensions)}; _C_cuda: {why}")
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


setup(
    package_dir=PACKAGE_DIR,
    packages=[*find_packages("python"), *(name for name in PACKAGE_DIR if name)],
    package_data={
        "orthonorm": ["py.typed", "rates.json"],
        "orthonorm.kernels": ["configs/*.json"],
        "orthonorm.bench": ["results/*.csv", "results/*.json", "gpu.sh"],
        "orthonorm.examples": ["*.json"],
    },
    **compiled(),
)
