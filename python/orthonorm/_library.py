"""Registration: one decorated reference is an op's schema, fallback, fake, oracle and docs.

`@op(schema)` defines `torch.ops.orthonorm.<name>` and installs the decorated body under
CompositeExplicitAutograd. So it serves every device without a kernel, and traces under
torch.compile. Compiled libraries (`_C.so`, `_C_cuda.so`) and Triton modules only fill dispatch keys
above it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _checks, _gpus

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "orthonorm"
BACKENDS = ("auto", "triton", "reference")
_library = torch.library.Library(NAMESPACE, "DEF")


class _Mark(threading.local):
    """Flag of each thread: True within an op whose arguments were checked.

    Ops that such an op calls then skip their checks, since it made their arguments.
    """

    on = False


_within = _Mark()


class Op(Generic[P, R]):
    """An op: calling it checks its arguments, then dispatches to the kernel of their device.

    Attributes:
        name, schema: as torch knows them (`torch.ops.orthonorm.<name>`).
        part: description of the inputs that a compiled library serves, if it does not serve all.
        overload: the torch op, whose kernels check their arguments; bodies of ops call it.
        composite: True if the body calls other ops; its speed is then theirs.
        has_gradient: True if `autograd` registered a gradient; without one backward raises.
    """

    def __init__(self, schema: str, body: Callable[P, R], composite: bool) -> None:
        self.name = schema[: schema.index("(")]
        self.schema, self.composite, self.has_gradient = schema, composite, False
        self._body = body
        self._check: Callable[P, None] | None = None
        self.part = ""
        self._in_part: Callable[P, bool] | None = None
        self.__doc__, self.__wrapped__ = body.__doc__, body
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._checked_body = self.checked(self.definition)
        _library.impl(self.name, self._checked_body, "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        arguments = enumerate(self.overload._schema.arguments)
        self._written = [
            (i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write
        ]
        # Without results the fake needs no body, which may slice by sizes; a graph must not.
        if schema.endswith("-> ()"):
            self.fake(lambda *args, **kwargs: None)  # type: ignore[arg-type]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and _within.on:
            return self.unchecked(*args, **kwargs)
        if self._check is not None:
            self._check(*args, **kwargs)
        for i, name in self._written:
            value: Any = args[i] if i < len(args) else kwargs.get(name)
            if isinstance(value, torch.Tensor):
                _checks.not_expanded(f"{self.name}: {name}", value)
            for j, t in enumerate(value if isinstance(value, (list, tuple)) else ()):
                _checks.not_expanded(f"{self.name}: {name}[{j}]", t)
        if self.has_gradient or not torch.is_grad_enabled():
            return self.unchecked(*args, **kwargs)
        given = (*args, *kwargs.values())
        return without_gradient(self.name, lambda: self.unchecked(*args, **kwargs), given)

    def unchecked(self, *args: Any, **kwargs: Any) -> R:
        """Call the dispatched op without checks, for arguments that the caller has checked.

        The caller answers for memory safety: kernels trust shapes, dtypes and devices. Traced calls
        are checked all the same, once per trace.
        """
        call: Callable[..., R] = self.overload
        if torch.compiler.is_compiling() or _within.on:
            return call(*args, **kwargs)
        _within.on = True
        try:
            return call(*args, **kwargs)
        finally:
            _within.on = False

    def __repr__(self) -> str:
        return f"<orthonorm op {self.schema}>"

    def check(self, function: Callable[P, None]) -> Callable[P, None]:
        """Decorator of a function that raises for wrong arguments, before anything is written."""
        self._check = function
        return function

    def fake(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorator of a function that makes results without values, for a body long to trace."""
        torch.library.register_fake(self.overload, self.checked(function), lib=_library)
        return function

    def serves_part(self, words: str) -> Callable[[Callable[P, bool]], Callable[P, bool]]:
        """Decorator of a predicate: inputs that a compiled library's overload `part` serves."""

        def declare(predicate: Callable[P, bool]) -> Callable[P, bool]:
            self.part, self._in_part = words, predicate
            return predicate

        return declare

    def split(self, rest: Callable[P, R]) -> Callable[P, R]:
        """Return a function: the library's part where the predicate holds, `rest` elsewhere."""
        in_part = self._in_part
        assert in_part is not None, self.name
        kernel: Callable[P, R] = getattr(getattr(torch.ops, NAMESPACE), self.name).part

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return (kernel if in_part(*args, **kwargs) else rest)(*args, **kwargs)

        return run

    def checked(self, kernel: Callable[P, R]) -> Callable[P, R]:
        """Return `kernel` behind this op's checks, which are skipped within an op that was checked.

        The result is what fills a dispatch key.
        """

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if _within.on:
                return kernel(*args, **kwargs)
            if self._check is not None:
                self._check(*args, **kwargs)
            _within.on = True
            try:
                return kernel(*args, **kwargs)
            finally:
                _within.on = False

        return run

    def definition(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the body alone; ops in it dispatch. Kernels call it for inputs they do not serve."""
        return self._body(*args, **kwargs)

    def reference(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the definition in plain torch, whatever kernels are loaded: oracle and baseline."""
        if not self.composite:
            return self._checked_body(*args, **kwargs)
        with reference():
            return self._checked_body(*args, **kwargs)


OPS: dict[str, Op[..., Any]] = {}


def op(schema: str, *, composite: bool = False) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Register the decorated reference under `schema`; set `composite` if it calls other ops."""

    def register(body: Callable[P, R]) -> Op[P, R]:
        made = Op(schema, body, composite)
        OPS[made.name] = made
        return made

    return register


def autograd(op: Op[..., Any], backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """Register an op's gradient; arguments are those of torch.library.register_autograd."""
    op.has_gradient = True
    torch.library.register_autograd(
        f"{NAMESPACE}::{op.name}", backward, setup_context=setup, lib=_library
    )


class _NoGradient(torch.autograd.Function):
    """Autograd node of a call without a gradient: its backward raises NotImplementedError."""

    @staticmethod
    def forward(name: str, call: Callable[[], Any], *inputs: torch.Tensor) -> Any:
        return call()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.name}: has no gradient; detach() its input, or call it within torch.no_grad(). "
            "Differentiable are spectral_norm, gram_iteration and the layers of orthonorm.nn, such "
            "as IterNorm"
        )


def without_gradient(name: str, call: Callable[[], R], inputs: Iterable[Any]) -> R:
    """Return call(); if an input requires a gradient, backward raises NotImplementedError.

    The error names `name`. Traced calls have no gradient, without an error. It does not use
    torch.library.register_autograd, which takes 10 us a call even if no input requires a gradient
    (torch 2.13, 2026-11).
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return call()
    tensors = [t for t in tensors_among(inputs) if t.requires_grad]
    if not tensors:
        return call()
    made: list[Any] = []

    def flat() -> Any:
        made.append(call())
        return tuple(made[0]) if isinstance(made[0], (list, tuple)) else made[0]

    found: Any = _NoGradient.apply(name, flat, *tensors)
    if isinstance(made[0], list):
        found = list(found)
    result: R = made[0]._make(found) if hasattr(made[0], "_make") else found
    return result


class reference(TorchDispatchMode):
    """Context manager in which every op runs its plain-torch reference."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            with self:
                return OPS[func._opname]._checked_body(*args, **kwargs)
        return func(*args, **kwargs)


def has_kernel(name: str, key: str) -> bool:
    """True if a compiled or Triton kernel fills dispatch key `key` ("CPU", "CUDA") of op `name`."""
    full = f"{NAMESPACE}::{name}"
    exists = torch._C._dispatch_has_kernel(full)  # an overload `part` exists only with its library
    return bool(exists and torch._C._dispatch_has_kernel_for_dispatch_key(full, key))


class Loaded:
    """Libraries and kernels found at import of the package; `python -m orthonorm` prints them."""

    def __init__(self) -> None:
        self.backend = os.environ.get("ORTHONORM_BACKEND", "auto")
        self.libraries: dict[str, str] = {}  # file name -> "loaded" or the reason it is not
        self.served: dict[tuple[str, str], str] = {}  # (op, key) -> "C++", "CUDA" or "Triton"
        self.parts: dict[tuple[str, str], str] = {}  # same keys -> inputs, if not all are served

    def load(self, folder: Path) -> None:
        """Load compiled libraries, which claim their keys first; Triton fills free CUDA keys."""
        if self.backend not in BACKENDS:
            raise ValueError(
                f"orthonorm: ORTHONORM_BACKEND must be one of {BACKENDS}, got {self.backend!r}"
            )
        self._load_library(folder / "_C.so", "CPU", "C++", wanted=True)
        has_cuda = torch.version.cuda is not None
        self._load_library(folder / "_C_cuda.so", "CUDA", "CUDA", wanted=has_cuda)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels on the CPU
        wanted = (has_cuda or interpreted) and self.backend != "reference"
        triton = wanted and importlib.util.find_spec("triton") is not None
        self.fill("CPU" if interpreted else "CUDA", triton)

    def _load_library(self, path: Path, key: str, label: str, wanted: bool) -> None:
        if self.backend != "auto":
            self.libraries[path.name] = f"not loaded: ORTHONORM_BACKEND={self.backend}"
        elif not wanted:
            self.libraries[path.name] = "not loaded: this torch is a CPU build"
        elif not path.exists():
            self.libraries[path.name] = "not built"
        elif reason := _gpus.unfit(path) if key == "CUDA" else "":
            self.libraries[path.name] = f"not loaded: {reason}"
        else:
            try:
                torch.ops.load_library(path)
            except OSError as error:  # built for another torch or CUDA: the next backend serves
                reason = str(error.__cause__ or error)
                self.libraries[path.name] = f"not loaded: {reason}{_gpus.built_for(path)}"
                return
            self.libraries[path.name] = "loaded"
            for name in OPS:
                if has_kernel(name, key):
                    self.served[name, key] = label

    def fill(self, key: str, triton: bool) -> None:
        """Fill keys that no library serves whole: its part first, then Triton's kernel.

        Kernels are imported at their first call: importing Triton takes a second.
        """
        for name, op in OPS.items():
            if has_kernel(name, key):
                continue
            module = f"{NAMESPACE}.kernels.{name.rstrip('_')}"
            found = triton and importlib.util.find_spec(module) is not None
            kernel: Callable[..., Any] = _Lazy(op, module) if found else op.definition
            if op.part and has_kernel(f"{name}.part", key):
                kernel, label = op.split(kernel), "CUDA"
                self.parts[name, key] = f"{op.part}; else {'Triton' if found else 'reference'}"
            elif found:
                label = "Triton"
            else:
                continue
            _library.impl(name, op.checked(kernel), key)
            self.served[name, key] = label


def triton_kernel(op: Op[P, R]) -> Callable[P, R]:
    """Return an op's Triton kernel, whatever serves the op, to compare with.

    For a composite op without one, return its definition, whose ops dispatch. Raise ImportError
    without Triton.
    """
    module = f"{NAMESPACE}.kernels.{op.name.rstrip('_')}"
    if op.composite and importlib.util.find_spec(module) is None:
        return op.checked(op.definition)
    return op.checked(guarded(getattr(importlib.import_module(module), op.name)))


def library_part(op: Op[P, R]) -> Callable[P, R]:
    """Return the kernel of a library that serves a part of an op, to compare with.

    It takes all inputs that it can, also those that the op's predicate gives to others.
    """
    part: Callable[P, R] = getattr(getattr(torch.ops, NAMESPACE), op.name).part
    return op.checked(part)


def tensors_among(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments, also those in lists and tuples."""
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_among(value)


def device_of(args: Iterable[Any]) -> torch.device | None:
    """Return the device of the first tensor among arguments, also in lists; None without one."""
    first = next(tensors_among(args), None)
    return None if first is None else first.device


def guarded(kernel: Callable[P, R]) -> Callable[P, R]:
    """Return `kernel` with its tensors' device made current, since Triton launches on that one."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = device_of((*args, *kwargs.values()))
        if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
            return kernel(*args, **kwargs)
        with torch.cuda.device(device):
            return kernel(*args, **kwargs)

    return run


class _Lazy:
    """Kernel of an op by Triton, imported when called; the definition if Triton cannot compile."""

    def __init__(self, op: Op[..., Any], module: str) -> None:
        self.op, self.module = op, module
        self.kernel: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kernel is None:
            reason = importlib.import_module(f"{NAMESPACE}.kernels.probe").failure()
            if reason:
                LOADED.libraries["Triton"] = f"cannot compile, definitions serve: {reason}"
                self.kernel = self.op.definition
            else:
                self.kernel = guarded(getattr(importlib.import_module(self.module), self.op.name))
        return self.kernel(*args, **kwargs)


LOADED = Loaded()
