"""Every op through Triton's own launcher, which binds, specializes and compiles as on a GPU, here
for sm_90: a driver in place of CUDA's loads nothing and launches nothing.

Run by `test_launched.py` in a process of its own. The interpreter (`interpreted.py`) checks numbers
and `test_triton_compile.py` every record of the tables; what a launch really passes, they do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from orthonorm import optim, orthogonalize
from orthonorm._library import LOADED, OPS
from orthonorm.bench.cases import CASES, Case
from orthonorm.bench.inputs import Inputs
from orthonorm.bench.triton_report import SHARED, measured
from orthonorm.kernels import configs, elementwise, iterations, lines, probe, product, tables
from test_ops import made
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

# `test_launched.py` runs this file in a process of its own; elsewhere it would change other tests.
unserved = "CPU" not in {key for _, key in LOADED.served}  # a CUDA build of torch has CUDA's
assert LOADED.backend == "triton" and unserved, "run tests/test_launched.py instead"
LOADED.fill("CPU", triton=True)

ARCH, PROCESSORS = "90", 132
CUDA = torch.device("cuda")
LAUNCHES: list[Launch] = []


class Launch(NamedTuple):
    """One launch: of what source, by what binary, on what grid."""

    source: Any
    metadata: Any
    binary: bytes
    grid: tuple[int, ...]


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata
        self.binary = b""
        DRIVER.newest = self  # its binary is loaded next

    def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
        LAUNCHES.append(Launch(self.source, self.metadata, self.binary, (x, y, z)))


class Driver:
    """What Triton asks of a driver."""

    launcher_cls = Launcher

    newest: Launcher

    @property
    def utils(self) -> Driver:
        return self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(ARCH), 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[ARCH], "multiprocessor_count": PROCESSORS}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[None, None, int, int, int]:
        self.newest.binary = binary
        return None, None, 0, 0, 1024


DRIVER = Driver()


@pytest.fixture(autouse=True, scope="module")
def hopper() -> None:
    """The choices made for one, on CPU tensors."""
    choice, blocks = orthogonalize._kept_choice, lines.blocks_of
    driver.set_active(DRIVER)
    probe.failure = lambda: ""  # type: ignore[assignment]
    configs.device_of = lambda device: (ARCH, PROCESSORS)  # type: ignore[assignment]
    elementwise.block_of = lambda device, of=elementwise.block_of: of(CUDA)
    lines.blocks_of = lambda device, *how: blocks(CUDA, *how)  # type: ignore[assignment]
    orthogonalize._kept_choice = lambda n, m, dtype, on_cpu, *how: choice(n, m, dtype, False, *how)


SERVED = [CASES[name] for name, key in LOADED.served if key == "CPU"]
# dense and not, batches, one row, tall and wide, in one launch and in several words
LIST = ((40, 40), (2, 64, 96), (13, 29), (1, 70), (640, 300))

# more than the 65535 programs that a GPU takes along the second and third axis of a grid
MANY = 2**16 + 1
LIKE_GPT2 = ((136, 136), (136, 408), (136, 544), (544, 136))


@pytest.mark.parametrize("case", SERVED, ids=lambda c: c.name)
def test_launches(case: Case) -> None:
    """They compile, and fit; those of dense matrices spill nothing."""
    LAUNCHES.clear()
    OPS[case.name](**made(case, LIST if case.takes_list else LIST[1:2], Inputs.named("bfloat16")))
    assert LAUNCHES
    for launch in {launch.metadata.hash: launch for launch in LAUNCHES}.values():
        assert launch.grid[0] > 0 and launch.grid[1:] == (1, 1)
        names = launch.source.fn.arg_names
        constants = {names[at[0]]: value for at, value in launch.source.constants.items()}
        if constants.get("ALIGNED") or constants.get("FLAT"):
            found = measured(launch.binary, ARCH)
            assert found["spills"] == 0, (launch.metadata.name, constants)


@pytest.mark.parametrize("name", ["magnitude", "power_iteration_", "factored_moment_"])
def test_long_lists_fit_the_grid(name: str) -> None:
    """One launch has all matrices, along the axis that takes 2^31 - 1 programs."""
    arguments = made(CASES[name], ((3, 5),), Inputs.named("bfloat16"))
    LAUNCHES.clear()
    OPS[name](**{k: v * MANY if isinstance(v, list) else v for k, v in arguments.items()})
    assert {launch.grid for launch in LAUNCHES} == {(MANY, 1, 1)}


@pytest.mark.parametrize("name", ["gram", "gram_polynomial", "small_newton_schulz"])
def test_old_architectures_are_left_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There Triton multiplies without tensor cores, on chip too."""
    arguments = made(CASES[name], ((40, 40),), Inputs.named("float16"))
    for arch, ours in (("75", False), ("80", True)):
        monkeypatch.setattr(configs, "device_of", lambda device, arch=arch: (arch, PROCESSORS))
        LAUNCHES.clear()
        OPS[name](**arguments)
        assert bool(LAUNCHES) == ours


def test_a_step_of_many_groups_fits_what_is_kept() -> None:
    """Else all of it would be made anew, step by step. Muon calls most functions for each group."""
    caches = [product.launches, elementwise.groups_of, iterations.applied, iterations.cut,
              iterations.laid, iterations.sizes, iterations.paired, lines.groups_of]  # fmt: skip
    params = [torch.nn.Parameter(torch.zeros(s)) for _ in range(48) for s in LIKE_GPT2]
    groups = [{"params": params[i : i + 4]} for i in range(0, len(params), 4)]
    opt = optim.Muon(groups)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        for cache in (*caches, tables.view, tables.place):
            cache.cache_clear()
        opt.step()
    found = [cache.cache_info() for cache in caches]
    assert max(info.currsize for info in found) > tables.LAUNCHES
    assert all(info.currsize == info.misses for info in found)  # nothing was dropped
    assert tables.place.cache_info().currsize / len(params) * 500 < tables.VIEWS


@pytest.mark.parametrize(("name", "few"), [("muon_step_", 30), ("conda_step_", 4)])
def test_steps_share_launches(name: str, few: int) -> None:
    """As many for two matrices of each shape as for one."""
    counts = []
    for shapes in (LIKE_GPT2, LIKE_GPT2 * 2):
        arguments = made(CASES[name], shapes, Inputs.named("bfloat16"))
        LAUNCHES.clear()
        OPS[name](**arguments)
        counts.append(len(LAUNCHES))
    assert counts[0] == counts[1] <= few


def test_adamw_of_halves_launches() -> None:
    """Weights of bfloat16 beside their mantissas: the kernel is compiled for int16."""
    arguments = made(CASES["adamw_step_"], LIST, Inputs.named("bfloat16"))
    mantissas = [torch.zeros_like(w, dtype=torch.int16) for w in arguments["params"]]
    LAUNCHES.clear()
    OPS["adamw_step_"](**arguments, mantissas=mantissas)
    types = {repr(t) for launch in LAUNCHES for t in launch.source.constants.values()}
    assert LAUNCHES and any("int16" in t for t in types), types
