"""Repairs of Triton's interpreter for bfloat16, which it computes on raw bits (3.6 to 3.9).

Products, casts and arithmetic on bfloat16 go through float32 and are rounded to nearest even, as on
a GPU; a sum of bfloat16 is refused. For test processes under TRITON_INTERPRET=1 only.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def is_bfloat16(value: Any) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def widened(value: Any) -> Any:
    """A bfloat16 handle in float32; anything else as it is."""
    if not is_bfloat16(value):
        return value
    bits = np.asarray(value.data).astype(np.uint32) << 16
    return Handle(np.asarray(bits).view(np.float32), tl.float32)


def narrowed(value: Any) -> Any:
    """A float32 handle rounded to bfloat16."""
    data = np.asarray(value.data, dtype=np.float32)
    bits = data.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(data), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _through_float32(name: str) -> None:
    original = getattr(Builder, name)

    def repaired(self: Any, *args: Any) -> Any:
        if not any(is_bfloat16(a) for a in args):
            return original(self, *args)
        result = original(self, *map(widened, args))
        return narrowed(result) if result.dtype.scalar == tl.float32 else result

    setattr(Builder, name, repaired)


def _index_by_scalars() -> None:
    """Triton 3.6 makes an int of an array of one element, which NumPy 2.4 has stopped to do."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *args: Any) -> Any:
        scope = original(tensor, *args)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return scope

    interpreter._patch_lang_tensor = patched


def _patch_once() -> None:
    """Leave the language patched, where Triton patches it anew at every call within a kernel.

    That was a third of the tests' time. Nothing in such a process needs the language as it was.
    """
    original, patched = interpreter._patch_lang, set()

    def patch(fn: Any) -> Any:
        found = {id(v) for v in fn.__globals__.values() if v is tl or v is tl.core}
        if not found <= patched:
            patched.update(found)
            original(fn)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch


def _know_dtypes() -> None:
    """Remember NumPy's dtype for each of Triton's, which are looked up for every operand."""
    original, known = interpreter._get_np_dtype, {}

    def get(dtype: Any) -> Any:
        scalar = dtype.scalar
        name = "pointer" if scalar.is_ptr() else scalar.name
        if name not in known:
            known[name] = original(dtype)
        return known[name]

    interpreter._get_np_dtype = get


def repair() -> None:
    """Install the repairs, once."""
    _index_by_scalars()
    _patch_once()
    _know_dtypes()
    # every integer operation again in 64 bits, a third of the time: see test_offsets_beyond_32_bits
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    cast, dot, total = Builder.cast_impl, Builder.create_dot, interpreter.ReduceOps.sum

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), acc, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        source = widened(source)
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        return narrowed(cast(self, source, tl.float32))

    def to_floating(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return self.cast_impl(source, target)

    def reduce_sum(self: Any, value: Any) -> Any:
        if value.dtype.scalar == tl.bfloat16:
            raise TypeError("interpreter: a sum of bfloat16; cast to float32 first")
        return total(self, value)

    Builder.create_dot, Builder.cast_impl = create_dot, cast_impl
    Builder.create_fp_to_fp = to_floating
    interpreter.ReduceOps.sum = reduce_sum
    for name in ("binary_op", "unary_op"):
        _through_float32(name)
