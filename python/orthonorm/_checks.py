"""Argument checks of ops and optimizers: every error names the op, the rule and the value."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Collection, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = sys.float_info.max
PLAIN = (Tensor, torch.nn.Parameter)  # types without behaviour of their own, as DTensor has


def shape(t: Tensor) -> tuple[int, ...]:
    """Return the shape as a plain tuple, for messages."""
    return tuple(t.shape)


def tensor(op: str, name: str, value: object, min_dim: int = 0) -> None:
    """Check that `value` is a dense floating-point tensor with at least `min_dim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense, got layout {value.layout}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {value.dtype}"
        )
    if value.dim() < min_dim:
        raise ValueError(
            f"{op}: {name} must have at least {min_dim} dimensions, got shape {shape(value)}"
        )


def not_expanded(label: str, value: Tensor) -> None:
    """Check that no two elements of a tensor share memory, so it can be written.

    Each stride must be above the span of all smaller ones, which views of dense tensors fulfil.
    """
    if value.is_contiguous() or 0 in value.shape:
        return
    steps = zip(value.stride(), value.shape, strict=True)
    reach = 0  # offset of the last element along the dimensions so far
    for step, n in sorted(pair for pair in steps if pair[1] > 1):
        if step <= reach:
            word = "be expanded" if step == 0 else "have elements that share memory"
            raise ValueError(f"{label} must not {word}, got strides {value.stride()}")
        reach += step * (n - 1)


def tensors(op: str, name: str, values: object, min_dim: int = 0) -> None:
    """Check that `values` is a list of dense floating-point tensors."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {type(values).__name__}")
    for i, value in enumerate(values):
        tensor(op, f"{name}[{i}]", value, min_dim)


def same_lengths(op: str, **lists: Sequence[Any]) -> None:
    """Check that the lists have equal lengths."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{op}: lists must have equal lengths, got {lengths}")


def same_shapes(op: str, **lists: Sequence[Tensor]) -> None:
    """Check that lists have equal lengths, i-th tensors of equal shapes, and all one device."""
    same_lengths(op, **lists)
    (first, leaders), *others = lists.items()
    for name, values in others:
        for i, (a, b) in enumerate(zip(leaders, values, strict=True)):
            if a.shape != b.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] must have the shape of {first}[{i}] "
                    f"{shape(a)}, got {shape(b)}"
                )
    same_device(op, **lists)


def same_device(op: str, **lists: Sequence[Tensor]) -> None:
    """Check that all tensors of the lists are on one device."""
    devices = {str(t.device) for values in lists.values() for t in values}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors must be on one device, got {sorted(devices)}")


def equal_shape(op: str, name: str, value: Tensor, wanted: Sequence[int]) -> None:
    """Check that `value` has the shape `wanted`."""
    if shape(value) != tuple(wanted):
        raise ValueError(f"{op}: {name} must have shape {tuple(wanted)}, got {shape(value)}")


def scalar(op: str, name: str, value: object, beside: Sequence[Tensor] = ()) -> None:
    """Check that `value` is a one-element tensor on the CPU or the device of `beside`.

    The element is not read: that would wait for the device.
    """
    tensor(op, name, value)
    if isinstance(value, Tensor):
        one_beside(op, name, value, beside)


def one_beside(op: str, name: str, value: Tensor, beside: Sequence[Tensor]) -> None:
    """Check that `value` has one element, on the CPU or the device of `beside`."""
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must have one element, got shape {shape(value)}")
    if beside and value.device.type not in ("cpu", beside[0].device.type):
        places = dict.fromkeys(("cpu", str(beside[0].device)))
        raise ValueError(f"{op}: {name} must be on {' or '.join(places)}, got {value.device}")


def seed(op: str, name: str, value: object, beside: Sequence[Tensor]) -> None:
    """Check that `value` is None or a one-element int64 tensor on the CPU or that of `beside`."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be None or an int64 Tensor, got {got}")
    one_beside(op, name, value, beside)


def scheduled(op: str, name: str, value: object, low: float, high: float) -> None:
    """Check that `value` is a number in [low, high], or a one-element tensor that has a value."""
    if isinstance(value, Tensor):
        scalar(op, name, value)
        if value.device.type == "meta":
            raise ValueError(f"{op}: {name} must have a value, got a tensor on the meta device")
    else:
        number(op, name, value, low, high)


def number(op: str, name: str, value: object, low: float = -LARGEST, high: float = LARGEST) -> None:
    """Check that `value` is a finite number in [low, high]."""
    if not low <= _real(op, name, value) <= high:
        raise ValueError(f"{op}: {name} must be in [{low:g}, {high:g}], got {value}")


def positive(op: str, name: str, value: Any) -> None:
    """Check that `value` is a finite number above 0."""
    number(op, name, value)
    if value <= 0:
        raise ValueError(f"{op}: {name} must be above 0, got {value}")


def fraction(op: str, name: str, value: object) -> None:
    """Check that `value` is a decay rate in [0, 1)."""
    if not 0.0 <= _real(op, name, value) < 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1), got {value}")


def plain(value: Any) -> Any:
    """Return Python's own int or float for other real numbers (NumPy's), also in tuples, lists."""
    if type(value) in (tuple, list):
        found = type(value)(map(plain, value))
        return value if all(map(is_, found, value)) else found
    kept = isinstance(value, int) or type(value) is float  # numpy.float64 is a kind of float
    if kept or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _real(op: str, name: str, value: object) -> float | torch.SymFloat | torch.SymInt:
    """Return `value` by `plain`; raise TypeError unless it is a real number (and not a bool)."""
    kinds = (int, float, torch.SymFloat, torch.SymInt)
    found = value if isinstance(value, kinds) else plain(value)  # traced calls stop at the former
    if isinstance(found, bool) or not isinstance(found, kinds):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return found


def integer(op: str, name: str, value: object, low: int) -> None:
    """Check that `value` is an integer in [low, 2^63)."""
    kinds = (int, torch.SymInt)
    found = value if isinstance(value, kinds) else plain(value)
    if isinstance(found, bool) or not isinstance(found, kinds):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if found < low:
        raise ValueError(f"{op}: {name} must be at least {low}, got {value}")
    if found >= 2**63:  # integers of op schemas have 64 bits
        raise ValueError(f"{op}: {name} must be below 2**63, got {value}")


def choice(op: str, name: str, value: object, options: Collection[Any]) -> None:
    """Check that `value` is one of `options`."""
    if value not in options:
        known = ", ".join(repr(o) for o in options)
        word = "one of " if len(options) > 1 else ""
        raise ValueError(f"{op}: {name} must be {word}{known}, got {value!r}")


def same_dtype(op: str, **values: Tensor) -> None:
    """Check that all tensors share one dtype."""
    dtypes = {name: str(t.dtype) for name, t in values.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"{op}: tensors must share one dtype, got {dtypes}")
