"""Registration and loading: what serves an op, references beside kernels, show-config."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import orthonorm
import pytest
import torch
from orthonorm import LOADED, OPS, _gpus, ops, optim
from orthonorm.__main__ import main, serving
from orthonorm._library import Loaded, guarded
from orthonorm.bench.cases import CASES, Case, as_list, tensors
from orthonorm.bench.inputs import Inputs, copied
from orthonorm.bench.shapes import Workload
from torch._subclasses import FakeTensorMode

KELLER = [3.4445, -4.7750, 2.0315] * 5


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


@pytest.mark.parametrize("name", ["distributed", "compat", "monitor", "nn", "optim", "ops"])
def test_any_module_may_be_imported_first(name: str) -> None:
    found = run(f"import orthonorm.{name}")
    assert found.returncode == 0, found.stderr


def test_every_op_is_exported_and_documented() -> None:
    assert set(ops.__all__) == set(OPS)
    for name, op in OPS.items():
        assert getattr(ops, name) is op
        assert op.__doc__ and op.schema.startswith(f"{name}(")
        assert getattr(torch.ops.orthonorm, name).default is op.overload


def test_every_optimizer_says_its_step_and_source() -> None:
    ours = [c for c in optim.REGISTRY.values() if c.__module__.startswith("orthonorm.")]
    for cls in ours:  # other tests make some of their own
        text = inspect.getdoc(cls) or ""
        assert "<-" in text and "Source:" in text, f"help({cls.__name__}) has no formula or source"


def test_every_leaf_op_has_a_cpu_kernel_where_the_library_is_built() -> None:
    if LOADED.libraries["_C.so"] != "loaded":
        pytest.skip(f"_C.so: {LOADED.libraries['_C.so']}")
    served = {name for name, key in LOADED.served if key == "CPU"}
    assert served >= {name for name, op in OPS.items() if not op.composite}
    assert serving("gram", "CPU") == ("C++", "kernel loaded")


def test_reference_mode_replaces_kernels_inside_composites() -> None:
    X = [torch.randn(3, 20, 30), torch.randn(150, 200)]
    wanted = ops.newton_schulz.reference(X, KELLER, [])
    with orthonorm.reference():
        got = ops.newton_schulz(X, KELLER, [])
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    calls = []
    body = OPS["gram"]._body
    try:
        OPS["gram"]._body = lambda X: calls.append(1) or body(X)
        ops.newton_schulz.reference([torch.randn(150, 200)], KELLER, [], "direct")
    finally:
        OPS["gram"]._body = body
    assert len(calls) == 5


def test_backend_variable() -> None:
    code = "import orthonorm as o; print(o.LOADED.libraries['_C.so'], len(o.LOADED.served))"
    off = run(code, ORTHONORM_BACKEND="reference")
    assert off.stdout.strip() == "not loaded: ORTHONORM_BACKEND=reference 0"
    bad = run(code, ORTHONORM_BACKEND="fast")
    assert bad.returncode == 1
    assert "ORTHONORM_BACKEND must be one of" in bad.stderr and "'fast'" in bad.stderr


def test_a_library_that_does_not_fit_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "_C_cuda.so"
    path.write_bytes(b"\0\0orthonorm built for: torch 2.13.0, CUDA 13.0, sm 8.0 9.0;\0")
    loaded = Loaded()
    loaded.backend = "auto"
    for capability in ((8, 0), (8, 9), (9, 0)):
        monkeypatch.setattr(_gpus, "capabilities", lambda c=capability: [c])
        assert _gpus.unfit(path) == ""
    loaded._load_library(path, "CUDA", "CUDA", wanted=True)  # the file is no library at all
    state = loaded.libraries["_C_cuda.so"]
    assert state.startswith("not loaded: ") and "built for torch 2.13.0, CUDA 13.0" in state
    monkeypatch.setattr(_gpus, "capabilities", lambda: [(9, 0), (10, 0)])
    loaded._load_library(path, "CUDA", "CUDA", wanted=True)
    assert "no code for a GPU of compute capability 10.0" in loaded.libraries["_C_cuda.so"]
    assert not loaded.served


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [("8.0", (8, 6), True), ("8.6", (8, 0), False), ("8.0", (9, 0), False),
     ("9.0a", (9, 0), True), ("10.0a", (10, 3), False), ("8.0+PTX", (12, 0), True),
     ("12.0", (12, 1), True), ("9.0", (10, 0), False), ("10.0", (10, 3), True),
     ("10.0", (12, 0), False)],
)  # fmt: skip
def test_architectures(architecture: str, capability: tuple[int, int], runs: bool) -> None:
    assert _gpus.covers(architecture, capability) is runs


@pytest.mark.parametrize(
    ("gpu", "shape", "dtype", "chain", "direct"),
    [
        ("sm_90", (3, 128, 128), torch.float16, True, True),
        ("sm_90", (129, 129), torch.bfloat16, True, True),
        ("sm_90", (32, 256, 256), torch.float16, True, True),
        ("sm_90", (33, 256, 256), torch.float16, False, False),  # not all at once
        ("sm_90", (257, 257), torch.float16, False, False),
        ("sm_90", (200, 200), torch.float32, False, False),
        ("sm_80", (128, 128), torch.float16, True, False),
        ("sm_80", (129, 129), torch.float16, False, False),
        ("sm_86", (64, 64), torch.float16, True, False),
        ("sm_86", (65, 65), torch.float16, False, False),  # too little shared memory
        ("sm_120", (129, 129), torch.float16, False, False),
    ],
)
def test_which_matrices_stay_on_chip(
    gpu: str, shape: tuple[int, ...], dtype: torch.dtype, chain: bool, direct: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    optin = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_120": 101376}[gpu]
    device = types.SimpleNamespace(
        major=int(gpu[3:-1]), shared_memory_per_block_optin=optin, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    with FakeTensorMode():
        X = torch.empty(shape, device="cuda", dtype=dtype)
        assert ops.gram_polynomial._in_part(X, KELLER) is chain
        assert ops.direct_polynomial._in_part(X, KELLER) is direct
        assert not ops.gram_polynomial._in_part(X, KELLER * 26)  # more than a launch holds
        wide = torch.empty(*shape[:-2], shape[-2], 512, device="cuda", dtype=dtype)
        assert ops.direct_polynomial._in_part(wide.mT, KELLER) is direct


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and orthonorm.__version__ in text
    assert all(name in text for name in [*OPS, "_C.so", "_C_cuda.so"])
    assert main(["--markdown"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| op ") and len(table) == 2 + len(OPS)


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["benhc"])
    assert stop.value.code == 2 and "benhc" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["cuda:1", "cuda:0", "cpu"])
def test_kernels_run_with_their_tensors_device_as_the_current_one(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Triton launches on the current device, whatever addresses it is given."""
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *raised: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel = guarded(lambda steps, X, scale=None: current[-1])
    with FakeTensorMode():  # tensors on devices that this machine need not have
        x = torch.empty(2, 2, device=place)
    expected = x.device.index or 0
    assert kernel(3, [x]) == kernel(3, X=[x]) == kernel(3, [], scale=x) == expected
    assert kernel(3, []) == 0 and current == [0]


WRITERS = [case for case in CASES.values() if case.op._written]


@pytest.mark.parametrize("case", WRITERS, ids=lambda c: c.name)
def test_what_is_written_must_not_be_expanded(case: Case) -> None:
    """Elements that share their memory: refused by name, before anything is written."""
    (good,) = case.calls(Workload("", ((4, 6),)), Inputs())
    tried = 0
    for name in (name for _, name in case.op._written if good.get(name) is not None):
        arguments = copied(good)
        first, *rest = as_list(arguments[name])
        long = next((d for d, n in enumerate(first.shape) if n > 1), None)
        if long is None:  # a number: nothing to expand
            continue
        spoilt = first.narrow(long, 0, 1).clone().expand(first.shape)
        arguments[name] = [spoilt, *rest] if isinstance(good[name], list) else spoilt
        before = [t.clone() for ts in tensors(arguments).values() for t in ts]
        with pytest.raises(ValueError, match=rf"{case.name}: {name}.* must not be expanded"):
            case.op(**arguments)
        after = [t for ts in tensors(arguments).values() for t in ts]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        tried += 1
    assert tried


def test_outputs_that_overlap_are_refused() -> None:
    """By strides other than 0 too; dense views, slices and dimensions of size 1 pass."""
    for shape, strides in (((4, 4), (1, 1)), ((3, 3), (2, 1)), ((2, 3, 4), (3, 4, 1))):
        x = torch.arange(30.0)
        with pytest.raises(ValueError, match=r"must not have elements that share memory"):
            ops.sign_([x.as_strided(shape, strides)])
        assert torch.equal(x, torch.arange(30.0))
    base = torch.randn(4, 6, 8)
    views = (base.mT, base.permute(2, 0, 1), base[:, ::2, 1:7:3], base[:, :1].expand(4, 1, 8))
    for view in (*views, torch.arange(4.0).as_strided((4, 1), (1, 1))):
        wanted = view.sign()
        ops.sign_([view])
        assert torch.equal(view, wanted)
