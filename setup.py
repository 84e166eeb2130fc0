"""Wheel build: the package map, and the compiled libraries from folder globs.

Every csrc/cpu/*.cpp goes into _C.so, every csrc/cuda/*.cu into _C_cuda.so (only where torch is a
CUDA build and nvcc is there). ORTHONORM_PURE=1 builds neither and imports no torch.
"""

from __future__ import annotations

import importlib.util
import os
from glob import glob

from setuptools import find_packages, setup

PACKAGE_DIR = {
    "": "python",
    "orthonorm.kernels": "kernels",
    "orthonorm.bench": "bench",
    "orthonorm.examples": "examples",
}


def compiled() -> dict:
    """setup() arguments for the native libraries; empty for a pure build."""
    if os.environ.get("ORTHONORM_PURE") == "1" or importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Libraries without Python symbols: one file serves every Python version."""

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

    # -fno-math-errno lets sqrt vectorize; nothing else is relaxed.
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden"]
    common = {"include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    extensions = [
        CppExtension(
            "orthonorm._C", sorted(glob("csrc/cpu/*.cpp")), extra_compile_args=flags, **common
        )
    ]
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    if cuda_sources and torch.version.cuda and CUDA_HOME:
        extensions.append(
            CUDAExtension(
                "orthonorm._C_cuda",
                cuda_sources,
                extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA"]},
                **common,
            )
        )
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
