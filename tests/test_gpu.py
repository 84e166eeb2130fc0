"""Every op on a CUDA device, whatever serves it there: the rule of `test_ops.py`, layouts, CUDA
graphs, no waiting for the device, the same bits again and in company."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import test_ops
import torch
from guards import check_bands
from orthonorm import ops, optim
from orthonorm._library import LOADED, library_part, triton_kernel
from orthonorm.bench.cases import CASES, Case, tensors
from orthonorm.bench.inputs import Arguments, Inputs, copied
from test_ops import Shapes, by_dtype, check_numbers, first_member, made, run

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device; bench/gpu.sh runs it on one", allow_module_level=True)
pytestmark = pytest.mark.gpu

ALL = tuple(CASES.values())
EACH = pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
LIST: Shapes = ((1, 1), (7, 1), (13, 29), (3, 5, 7), (131, 67), (128, 96), (2, 64, 64))
LARGE: Shapes = ((768, 3072), (1024, 512), (4, 300, 1000), (257, 129))
SMALL: Shapes = ((3, 128, 128), (128, 64), (100, 120))


def inputs(dtype: str, **settings: object) -> Inputs:
    return Inputs.named(dtype, device="cuda", **settings)


def calls(case: Case, shapes: Shapes) -> list[Shapes]:
    return [shapes] if case.takes_list else [(s,) for s in shapes]


@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(c, d, id=f"{c.name}-{d}") for c in ALL for d in by_dtype(c)]
)
@pytest.mark.parametrize("shapes", [LIST, LARGE], ids=["awkward", "large"])
def test_error(case: Case, dtype: str, shapes: Shapes) -> None:
    for some in calls(case, SMALL if case.limit and shapes is LARGE else shapes):
        check_numbers(case, some, inputs(dtype))


TWINS = [c for c in ALL if LOADED.served.get((c.name, "CUDA")) == "CUDA"]


@pytest.mark.parametrize("case", TWINS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_triton_twin_of_a_cuda_kernel(case: Case, dtype: str) -> None:
    """Both are callable in one process and held to the same rule."""
    for some in calls(case, SMALL):
        check_numbers(case, some, inputs(dtype), kernel=triton_kernel(case.op))


def room(bytes_of_a_block: int) -> bool:
    """Whether this GPU's blocks may have as much shared memory; those of sm_120 may not."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(device.shared_memory_per_block_optin) >= bytes_of_a_block


@pytest.mark.parametrize(
    ("dtype", "columns"), [("float64", 768), ("float32", 1536), ("bfloat16", 3072)]
)
@pytest.mark.parametrize("rows", [40, 200])
def test_power_iteration_of_48_kb(dtype: str, columns: int, rows: int) -> None:
    """Eight rows are as much shared memory as a launch gets unasked; kernels have some besides."""
    check_numbers(CASES["power_iteration_"], ((rows, columns),), inputs(dtype))


@pytest.mark.skipif(
    ("gram_polynomial", "CUDA") not in LOADED.parts
    or torch.cuda.get_device_capability() < (9, 0)
    or not room(218112),
    reason="clusters need the CUDA library, sm_90 and 213 KB of shared memory",
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n", [129, 200, 255, 256, 300, 512])
def test_clusters(n: int, dtype: str) -> None:
    """Also sides that the ops leave to Triton."""
    gram, direct = (CASES[name] for name in ("gram_polynomial", "direct_polynomial"))
    check_numbers(gram, ((3, n, n),), inputs(dtype), kernel=library_part(gram.op))
    for shape in ((n, 512), (512, n), (2, n, n)):
        check_numbers(direct, (shape,), inputs(dtype), kernel=library_part(direct.op))


@pytest.mark.parametrize(
    ("case", "variant"),
    [pytest.param(c, v, id=f"{c.name}-{i}") for c in ALL for i, v in enumerate(c.variants)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variant(case: Case, dtype: str, variant: Arguments) -> None:
    for some in calls(case, ((3, 16, 40), (40, 16), (64, 64))):
        check_numbers(case, some, inputs(dtype, seed=1), **variant)


@EACH
@pytest.mark.parametrize("layout", ["transposed", "reversed", "sliced", "strided"])
def test_layout(case: Case, layout: str) -> None:
    check_numbers(case, ((2, 3, 17, 9),), inputs("float32", layout=layout))
    check_numbers(case, ((2, 40, 72),), inputs("bfloat16", layout=layout))


@EACH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bands(case: Case, dtype: str) -> None:
    """Nothing is written outside of tensors that are moved 16 bytes an access."""
    for some in calls(case, SMALL):
        check_bands(case, some, inputs(dtype))


def repeatable(case: Case) -> Arguments:
    return made(case, ((2, 96, 200), (128, 64), (1, 70)), inputs("float32"))


@EACH
def test_same_bits_again(case: Case) -> None:
    arguments = repeatable(case)
    first, second = (run(case, case.op, copied(arguments)) for _ in range(2))
    for name, values in first.items():
        assert all(torch.equal(a, b) for a, b in zip(values, second[name], strict=True)), name


@pytest.mark.parametrize("case", [c for c in ALL if not c.op.composite], ids=lambda c: c.name)
def test_company(case: Case) -> None:
    arguments = repeatable(case)
    both = run(case, case.op, copied(arguments))
    alone = run(case, case.op, first_member(case, copied(arguments)))
    for name, values in alone.items():
        wanted = both[name][0]
        if wanted.dim():
            line = name.startswith("result") and wanted.dim() == 1
            wanted = wanted[:1] if line else wanted[0]
        assert torch.equal(values[0].reshape(wanted.shape), wanted), name


@pytest.fixture(autouse=True)
def sticky() -> Iterator[None]:
    """After some errors every later call of the process fails too: end it with the test at fault.

    xdist then says which test it was, and goes on in a new process.
    """
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(error, file=sys.__stderr__, flush=True)
        os._exit(1)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@EACH
def test_waits_for_nothing(case: Case, no_waiting: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    arguments = repeatable(case)
    run(case, case.op, copied(arguments))
    torch.cuda.set_sync_debug_mode("error")
    run(case, case.op, arguments)


@EACH
def test_graph(case: Case) -> None:
    """Captured and replayed on other numbers in the same places: as eager, bit for bit."""
    arguments = repeatable(case)
    others = made(case, ((2, 96, 200), (128, 64), (1, 70)), inputs("float32", seed=5))
    wanted = run(case, case.op, copied(others))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(case, case.op, copied(arguments))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(case, case.op, arguments)
    replaced = tensors(others)
    for name, values in tensors(arguments).items():
        for value, other in zip(values, replaced[name], strict=True):
            value.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for name, values in outputs.items():
        assert all(torch.equal(a, b) for a, b in zip(values, wanted[name], strict=True)), name


@pytest.mark.skipif(
    LOADED.served.get(("divide_each", "CUDA")) != "CUDA", reason="needs the CUDA library"
)
def test_numbers_of_the_host_in_a_graph() -> None:
    """What a graph would copy from the host's memory, or not count, in every replay is refused."""
    X, divisors = torch.randn(3, 4, 5, device="cuda"), torch.ones(3, dtype=torch.float64)
    arguments = made(CASES["adamw_step_"], ((4, 5),), inputs("float32"))
    arguments["steps"] = [torch.tensor(3.0)]
    graph = torch.cuda.CUDAGraph()
    rule = r"divide_each: divisors must be on the device of X.0. in a CUDA graph, got 3 numbers"
    with torch.cuda.graph(graph):
        X.add_(1)  # torch warns of empty graphs
        with pytest.raises(RuntimeError, match=rule):
            ops.divide_each.overload(X, divisors, torch.float32)
        rule = "adamw_step_: steps must be on the device of params in a CUDA graph"
        with pytest.raises(RuntimeError, match=rule):
            ops.adamw_step_.overload(**arguments)
    assert arguments["steps"][0] == 3


@EACH
def test_nonfinite_and_empty(case: Case) -> None:
    arguments = repeatable(case)
    for value in tensors(arguments).values():
        if value[0].dim() > 1 and value[0].numel():
            value[0].view(-1)[0] = float("nan")
    run(case, case.op, arguments)
    for shape in test_ops.EMPTY:
        run(case, case.op, made(case, (shape,), inputs("float32")))


@pytest.mark.parametrize("cls", [optim.Muon, optim.Conda], ids=lambda c: c.__name__)
def test_optimizer_descends(cls: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(200, 300), torch.nn.Tanh(), torch.nn.Linear(300, 10)]
    model = torch.nn.Sequential(*layers).cuda()
    x, y = torch.randn(64, 200, device="cuda"), torch.randn(64, 10, device="cuda")
    optimizer = cls(optim.split_params(model), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


DECOMPOSING = ("Dion", "Shampoo", "StiefelAdam")  # torch's decompositions may wait, in each step


@pytest.mark.parametrize("name", [name for name in optim.REGISTRY if name not in DECOMPOSING])
def test_optimizer_waits_for_nothing(name: str) -> None:
    """Between refreshes, whose `eigh` waits inside torch."""
    params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in ((96, 200), (2, 40, 40))]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = optim.REGISTRY[name](params)
    for _ in range(3):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
