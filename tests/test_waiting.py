"""No optimizer's step waits for a GPU: on tensors of a device that is not here, which have shapes
and no numbers, every copy between it and the host must be one that may be late.

Decompositions (`eigh` at refreshes) wait inside torch; what the kernels do, tests/test_gpu.py sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from orthonorm import optim
from orthonorm.distributed import agreement, comm_report, copies, exchange, share_work
from orthonorm.optim import stiefel_adam, tensors
from orthonorm.optim.tensors import mesh_places, mesh_ranks, numbers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)


def place_of(t: Any) -> str:
    return t.fake_device.type if isinstance(t, FakeTensor) else t.device.type


class Waits(TorchDispatchMode):
    """Names of the calls that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        waits = name == "_to_copy" and place_of(args[0]) != place_of(out)
        if (waits and not kwargs.get("non_blocking")) or name in ("_local_scalar_dense", "nonzero"):
            self.found.append(name)
        return out


@pytest.fixture(autouse=True)
def no_singular_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing a step asks of numbers: StiefelAdam's first, whether it can begin."""
    monkeypatch.setattr(stiefel_adam, "singular", lambda W: [False] * len(W))


# SSO's first step copies into one matrix, which asks for a device even of tensors without numbers
@pytest.mark.parametrize("name", [name for name in optim.REGISTRY if name != "SSO"])
def test_step_waits_for_nothing(name: str) -> None:
    """A first step, which makes state, and one more, by default settings."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(*s, device=CUDA)) for s in ((64, 32), (2, 9, 40))]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = optim.REGISTRY[name](params)
        for _ in range(2):
            with Waits() as waits:
                optimizer.step()
            assert not waits.found


@pytest.mark.parametrize("rule", ["matrix", "adamw"])
def test_a_rate_on_the_host_waits_for_nothing(rule: str) -> None:
    """A scheduler's tensors on the CPU: copied as torch's own optimizers copy them."""
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(64, 32, device=CUDA))
        p.grad = torch.empty_like(p)
        rates: dict[str, Any] = {"lr": torch.tensor(0.02)}
        if rule == "matrix":
            rates["momentum"] = torch.tensor([0.9])
        optimizer = optim.Muon([{"params": [p], "rule": rule, **rates}])
        for _ in range(2):
            with Waits() as waits:
                optimizer.step()
            assert not waits.found


def test_a_rate_on_the_device_is_waited_for_by_the_host() -> None:
    """A late copy to the host would be read before it is there."""
    with FakeTensorMode(), torch.no_grad():
        optimizer = optim.Muon([nn.Parameter(torch.empty(4, 4))])
        group = {"lr": torch.tensor(0.02, device=CUDA)}
        with Waits() as waits:
            assert optimizer.scalar(group, "lr", torch.device("cpu")).shape == ()
        assert waits.found == ["_to_copy"]


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks with GPUs, of which one is here, and whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        found = DeviceMesh("cuda", [0, 1])
        mesh_places(found), mesh_ranks(found)  # kept: the mesh's own tensor has numbers
        yield found
    finally:
        dist.destroy_process_group()


SHARED = (
    "Muon", "NorMuon", "AdaMuon", "Scion", "ScionLight", "MuonEq", "PolarGrad", "SWAN",
    "HybridAuON", "SteepestDescent", "TrustRegion",
)  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", [name for name in optim.REGISTRY if name != "SSO"])
def test_distributed_step_waits_for_nothing(
    name: str, shared: bool, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with owners, and of a plain parameter beside, whose work ranks may share; what hosts
    tell each other is numbers, of which fake tensors have none (test_distributed_hosts.py)."""
    told: list[int] = []

    def gathered(group: Any, device: torch.device, number: int, what: str = "") -> list[int]:
        told.append(number)
        return [number] * 2

    monkeypatch.setattr(agreement, "gathered", gathered)
    # copies on the device, which ask for it even of tensors without numbers
    for module in (copies, exchange):
        monkeypatch.setattr(module, "read", lambda buffer, tensors: [*tensors])
    with FakeTensorMode(allow_non_fake_inputs=True):
        params: list[Any] = [torch.empty(32, 24, device=CUDA) for _ in range(3)]
        params = [DTensor.from_local(p, mesh, [Shard(0)], run_check=False) for p in params]
        params.append(torch.empty(9, 40, device=CUDA))
        params = [nn.Parameter(p, requires_grad=False) for p in params]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = optim.REGISTRY[name](params)
        if shared:
            share_work(optimizer)
        for _ in range(2):
            with Waits() as waits:
                optimizer.step()
            assert not waits.found
        gathers = comm_report(optimizer).gathers
    assert gathers == (shared and name in SHARED)
    assert len(told) >= 2 or name in ("AdamW", "Signum")  # which exchange nothing


@pytest.mark.parametrize("values", [0.1, [1e300, -0.3, float("inf")]])
def test_a_graph_keeps_the_numbers_of_the_host(values: Any, monkeypatch: Any) -> None:
    """It would read the source of a copy in every replay; no call here reads the host's memory."""
    wanted = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(tensors.written(wanted, torch.device("cpu")), wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True), monkeypatch.context() as patch:
        patch.setattr(tensors, "sent", None)
        patch.setattr(tensors, "written", lambda made, device: torch.empty(3, device=device))
        assert numbers(values, CUDA).shape == (3,)


def test_waiting_is_seen() -> None:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(3, device=CUDA)
        with Waits() as waits:
            numbers([1.0, 2.0, 3.0], CUDA)
            torch.ones(3).to(CUDA, non_blocking=True)
        assert not waits.found
        with Waits() as waits:
            torch.ones(3).to(CUDA)
            torch.tensor([1.0], device=CUDA)
            x.cpu()
        assert waits.found == ["_to_copy"] * 3


def test_nothing_made_for_a_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a CUDA graph writes holds nothing before its first replay: no step reads it."""
    made, cpu = tensors.Numbers(), torch.device("cpu")
    monkeypatch.setattr(tensors, "captured", lambda device: True)
    own = made(0.5, cpu)
    assert own.dtype == torch.float64 and own.shape == () and own == 0.5
    assert not made._ones and not made._kept
