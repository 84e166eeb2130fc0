"""Candidates: ours, the reference, torch's own way and the memory floor, as calls on one input.

`start` functions do everything that need not be timed and return a Running. What a peer cannot do
(a rank it does not take, a package that is not there) it says by raising Unavailable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from orthonorm._library import LOADED, NAMESPACE, OPS, library_part, triton_kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Case, Outputs, tensors
from .inputs import DTYPES, Arguments

# what may stand beside ours; those after "floor" take seconds a call or to compile
KINDS = ("backend", "reference", "torch", "package", "floor", "exact", "compiled")


class Unavailable(Exception):
    """Why a candidate cannot run here: one sentence."""


class Running(NamedTuple):
    """A candidate ready to run.

    Attributes:
        call: what gets timed.
        outputs: names what the call produced, for the judges.
        flops: its own, if they are not the op's.
        timed: where given, timed instead of `call`: the same without keeping what it returns, as a
            caller who goes on would, and as the floor does.
        dtype: that its products run in, if it is not the op's choice.
        same: whether it means the same numbers as our op; else only its polar factor is judged.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], Outputs] = lambda _: {}
    flops: float | None = None
    timed: Callable[[], Any] | None = None
    dtype: str | None = None
    same: bool = True


Start = Callable[[Case, list[Arguments]], Running]


class Peer(NamedTuple):
    label: str
    kind: str
    start: Start
    package: str = ""  # that brings it, where it is not torch

    def wanted(self, names: tuple[str, ...]) -> bool:
        return self.kind in names or self.package in names


def run_calls(f: Callable[..., Any], case: Case, calls: list[Arguments]) -> Running:
    """An implementation with the op's own signature, once per call of the workload."""
    bound = [functools.partial(f, **arguments) for arguments in calls]

    def outputs(returned: list[Any]) -> Outputs:
        found: Outputs = {}
        for arguments, result in zip(calls, returned, strict=True):
            for name, values in case.outputs(arguments, result).items():
                found.setdefault(name, []).extend(values)
        return found

    if len(bound) == 1:
        only = bound[0]
        return Running(only, lambda result: outputs([result]))

    def timed() -> None:
        for g in bound:
            g()

    return Running(lambda: [g() for g in bound], outputs, timed=timed)


def start_ours(case: Case, calls: list[Arguments]) -> Running:
    return run_calls(case.op, case, calls)


def start_reference(case: Case, calls: list[Arguments]) -> Running:
    return run_calls(case.op.reference, case, calls)


def start_triton(case: Case, calls: list[Arguments]) -> Running:
    """The Triton kernel beside a CUDA one that serves the op."""
    return run_calls(triton_kernel(case.op), case, calls)


def start_part(case: Case, calls: list[Arguments]) -> Running:
    """The CUDA kernel that serves a part of an op, also where the op leaves matrices to Triton."""
    return run_calls(library_part(case.op), case, calls)


# torch ops that an optimizer's rule asks for: products and factorizations; all else of torch in a
# step is glue
ALGEBRA = (
    "mm", "bmm", "addmm", "baddbmm", "baddbmm_", "linalg_eigh", "_linalg_eigh", "linalg_qr",
    "linalg_cholesky_ex", "cholesky_solve",
)  # fmt: skip


class _Serving(TorchDispatchMode):
    """Notes which backend serves every op that a call reaches, bodies of composites included; with
    `keep` the calls themselves too, those of torch's ALGEBRA among them."""

    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        self.labels: set[str] = set()
        self.keep, self.calls = keep, list[Callable[[], Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = func.namespace == NAMESPACE
        if ours:
            op = OPS[func._opname]
            key = next((t.device.type for t in _flat(args)), "cpu").upper()
            label = LOADED.served.get((op.name, key))
            if label is None and op.composite:
                with self:
                    return op._checked_body(*args, **kwargs)
            self.labels.add(label or "reference")
        if self.keep and (ours or func._opname in ALGEBRA):
            self.calls.append(functools.partial(func, *args, **kwargs))
        return func(*args, **kwargs)


def _flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


def kernels_of(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """The kernels that `call` runs, with their arguments: repeated, they are its work without the
    Python and the elementwise torch between them (buffers that a step makes anew are reused)."""
    with _Serving(keep=True) as mode:
        call()
    return [_repeatable(kernel) for kernel in mode.calls]


def _repeatable(kernel: Callable[[], Any]) -> Callable[[], Any]:
    """A call of `scaled_polynomial_`, which leaves the polar factor in its place, in a place of its
    own and over the norm of that: over another norm its entries would vanish or overflow, and such
    are multiplied faster."""
    assert isinstance(kernel, functools.partial)
    if kernel.func._opname != "scaled_polynomial_":
        return kernel
    X, _, *rest = kernel.args
    X = X.clone()  # a step's work buffer: its other kernels write there
    norms = torch.linalg.matrix_norm(X.double()).reshape(-1)
    return functools.partial(kernel.func, X, norms, *rest, **kernel.keywords)


def served_by(call: Callable[[], Any]) -> str:
    """ "C++", "Triton", "reference", or several joined by " + ": who does the work of this call."""
    with _Serving() as mode:
        call()
    return " + ".join(sorted(mode.labels)) or "reference"


# ---- ceilings ------------------------------------------------------------------------------------
def read(t: Tensor) -> Tensor:
    """One pass over a tensor that keeps nothing: a sum of its bits, as fast in every dtype.

    Of torch's reductions the fastest on one core (float32, 340 MB: sum 10.1 ms, this 10.2, amax
    11.6, vector_norm and dot 11.7; 2026-11).
    """
    whole = t.is_contiguous() and t.numel() * t.element_size() % 8 == 0
    return t.view(-1).view(torch.int64).sum() if whole else t.sum()


PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "read": read,
    "update": lambda t: t.mul_(1.0),  # read and write in place, numbers unchanged
    "copy": lambda t: t * 1.0,  # read, and write to a fresh tensor
    "write": lambda t: t.zero_(),
}
TRAFFIC = {"read": 1, "update": 2, "copy": 2, "write": 1}


def passes(case: Case, calls: list[Arguments]) -> Iterator[tuple[str, Tensor]]:
    """The passes over memory that a call cannot avoid, matrix by matrix.

    Arguments 64 times smaller than their matrix are left out.
    """
    for arguments in calls:
        named = tensors(arguments)
        for i in range(max((len(ts) for ts in named.values()), default=0)):
            entry = {name: ts[i] for name, ts in named.items() if i < len(ts)}
            size = max(t.numel() for t in entry.values())
            large = {name: t for name, t in entry.items() if 64 * t.numel() >= size}
            for name in case.reread:
                yield "read", large[name]
            for name, t in large.items():
                if name in case.written:
                    yield "write", t
                elif name in case.mutated:
                    yield "update", t
                else:
                    yield ("copy" if case.maps else "read"), t


def bytes_moved(case: Case, calls: list[Arguments]) -> float:
    """The least traffic of a call in bytes."""
    return float(sum(TRAFFIC[k] * t.numel() * t.element_size() for k, t in passes(case, calls)))


PRODUCT = 1024  # sides of the product that stands for the arithmetic a processor offers


def start_product(case: Case, calls: list[Arguments]) -> Running:
    """torch.mm in the dtype the op's products may run in: the rate beside the rate."""
    arguments = calls[0]
    t = next(iter(tensors(arguments).values()))[0]
    dtype = arguments.get("dtype", DTYPES.get(arguments.get("precision", ""), t.dtype))
    if dtype == torch.float16 and t.device.type == "cpu":
        raise Unavailable("float16 products through torch on a CPU tell nothing")
    A, B = (torch.randn(PRODUCT, PRODUCT, device=t.device).to(dtype) for _ in range(2))
    name = next(n for n, d in DTYPES.items() if d == dtype)
    return Running(functools.partial(torch.mm, A, B), flops=2.0 * PRODUCT**3, dtype=name)


def start_floor(case: Case, calls: list[Arguments]) -> Running:
    """The same passes over the same tensors by torch, numbers of the arguments kept."""
    steps = [functools.partial(PASSES[kind], t) for kind, t in passes(case, calls)]

    def call() -> None:
        for step in steps:
            step()

    return Running(call)
