"""Candidates: ours, the reference, torch's own way and the memory floor, as calls on one input.

`start` functions do everything that is not to be timed, and return a Running. They raise
Unavailable for what a peer cannot do (an input it does not take, a package that is missing).
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

# kinds of candidates beside ours; those after "floor" take seconds per call, or to compile
KINDS = ("backend", "reference", "torch", "package", "floor", "exact", "compiled")


class Unavailable(Exception):
    """A candidate cannot run here; the message is one sentence that says why."""


class Running(NamedTuple):
    """A candidate ready to run.

    Attributes:
        call: the function to time.
        outputs: turns the results of the call into named tensors, for the judges.
        flops: floating-point operations, if they are not those of the op.
        timed: timed in place of `call` if given. It drops each result at once, as the floor does.
        dtype: dtype of its products, if it is not the op's choice.
        same: True if it computes the same numbers as our op; otherwise only its polar factor is
            judged.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], Outputs] = lambda _: {}
    flops: float | None = None
    timed: Callable[[], Any] | None = None
    dtype: str | None = None
    same: bool = True


Start = Callable[[Case, list[Arguments]], Running]


class Peer(NamedTuple):
    """A candidate by its label in tables, its kind (of KINDS) and the function that starts it."""

    label: str
    kind: str
    start: Start
    package: str = ""  # the package it comes from, if not torch

    def wanted(self, names: tuple[str, ...]) -> bool:
        """True if its kind or its package is among the names."""
        return self.kind in names or self.package in names


def run_calls(f: Callable[..., Any], case: Case, calls: list[Arguments]) -> Running:
    """Start an implementation that has the op's signature: one call per entry of `calls`."""
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
    """Start our op."""
    return run_calls(case.op, case, calls)


def start_reference(case: Case, calls: list[Arguments]) -> Running:
    """Start the op's definition in plain torch."""
    return run_calls(case.op.reference, case, calls)


def start_triton(case: Case, calls: list[Arguments]) -> Running:
    """Start the Triton kernel of an op that a CUDA kernel serves."""
    return run_calls(triton_kernel(case.op), case, calls)


def start_part(case: Case, calls: list[Arguments]) -> Running:
    """Start the CUDA kernel of a part of an op, also for matrices that the op leaves to Triton."""
    return run_calls(library_part(case.op), case, calls)


# torch ops that count as work of an optimizer's rule: products and factorizations. The rest of
# torch in a step is overhead.
ALGEBRA = (
    "mm", "bmm", "addmm", "baddbmm", "baddbmm_", "linalg_eigh", "_linalg_eigh", "linalg_qr",
    "linalg_cholesky_ex", "cholesky_solve",
)  # fmt: skip


class _Serving(TorchDispatchMode):
    """Records which backend serves each op that a call reaches, also within composite ops.

    With `keep` it also records the calls of these ops, and of torch's ALGEBRA.
    """

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
    """Yield the tensors of nested lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


def kernels_of(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """Return the kernel calls that `call` makes, with their arguments.

    Repeating them does the same work without the Python and the elementwise torch in between.
    Buffers that a step would allocate anew are reused.
    """
    with _Serving(keep=True) as mode:
        call()
    return [_repeatable(kernel) for kernel in mode.calls]


def _repeatable(kernel: Callable[[], Any]) -> Callable[[], Any]:
    """Return a kernel call that can be repeated.

    `scaled_polynomial_` overwrites X by its polar factor, or reads a work buffer. Its call is
    changed to read a copy of that, over the norm of the copy. Divided by another norm, entries
    would vanish or overflow in repeats, and such numbers are multiplied faster.
    """
    assert isinstance(kernel, functools.partial)
    if kernel.func._opname != "scaled_polynomial_":
        return kernel
    X, _, *how = kernel.args
    # both are work buffers of the step, to which other kernels write
    X, *read = (t.clone() for t in (X, *how[4:]))
    norms = torch.linalg.matrix_norm((read or [X])[0].double()).reshape(-1)
    return functools.partial(kernel.func, X, norms, *how[:4], *read)


def served_by(call: Callable[[], Any]) -> str:
    """Return the backends that do the work of a call: "C++", "Triton" or "reference", or several.

    Several are joined by " + ".
    """
    with _Serving() as mode:
        call()
    return " + ".join(sorted(mode.labels)) or "reference"


# ---- ceilings ------------------------------------------------------------------------------------
def read(t: Tensor) -> Tensor:
    """Read a tensor once: sum its bits as int64, which is as fast in every dtype.

    On one core this is as fast as torch's fastest reduction (float32, 340 MB: sum 10.1 ms, this
    10.2, amax 11.6, vector_norm and dot 11.7; 2026-11).
    """
    whole = t.is_contiguous() and t.numel() * t.element_size() % 8 == 0
    return t.view(-1).view(torch.int64).sum() if whole else t.sum()


PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "read": read,
    "update": lambda t: t.mul_(1),  # read and write in place; numbers stay unchanged
    "copy": lambda t: t * 1.0,  # read, and write to a new tensor
    "write": lambda t: t.zero_(),
}
TRAFFIC = {"read": 1, "update": 2, "copy": 2, "write": 1}


def passes(case: Case, calls: list[Arguments]) -> Iterator[tuple[str, Tensor]]:
    """Yield the passes over memory, (kind, tensor), that a call cannot avoid, matrix by matrix.

    Arguments that are more than 64 times smaller than their matrix are left out.
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
    """Return the least number of bytes that a call reads and writes."""
    return float(sum(TRAFFIC[k] * t.numel() * t.element_size() for k, t in passes(case, calls)))


PRODUCT = 1024  # side of the product that measures the arithmetic rate of a processor


def start_product(case: Case, calls: list[Arguments]) -> Running:
    """Start torch.mm in the dtype of the op's products, to compare its rate with ours."""
    arguments = calls[0]
    t = next(iter(tensors(arguments).values()))[0]
    dtype = arguments.get("dtype", DTYPES.get(arguments.get("precision", ""), t.dtype))
    if dtype == torch.float16 and t.device.type == "cpu":
        raise Unavailable("float16 products through torch on a CPU tell nothing")
    A, B = (torch.randn(PRODUCT, PRODUCT, device=t.device).to(dtype) for _ in range(2))
    name = next(n for n, d in DTYPES.items() if d == dtype)
    return Running(functools.partial(torch.mm, A, B), flops=2.0 * PRODUCT**3, dtype=name)


def start_floor(case: Case, calls: list[Arguments]) -> Running:
    """Start the unavoidable passes over the same tensors by torch."""
    steps = [functools.partial(PASSES[kind], t) for kind, t in passes(case, calls)]

    def call() -> None:
        for step in steps:
            step()

    return Running(call)
