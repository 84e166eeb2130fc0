"""Type of the rows for public items of orthonorm.nn and orthonorm.monitor, and helpers.

A row has arguments and an independent formula; `public.py` has the table. Tests compare every
public item with its formula in float64 and check its gradient. The benchmark times both.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import Arguments, Inputs
from .shapes import Shape


@dataclass(frozen=True)
class Item:
    """A public item: its arguments, and a formula that its results must equal.

    Attributes:
        make: makes keyword arguments from the shape of a matrix. Singular values are a power law by
            default, so that power iteration converges.
        formula: computes the same results from the same arguments in plain torch: by SVD, eigh,
            autograd or the definition.
        call: function that calls the item with the arguments; None: the item itself.
        gradient: arguments in which the item is differentiable.
        rtol: allowed relative distance to the formula in float64; larger where an iteration stops
            before rounding.
        shapes, dtypes: those of the benchmark.
    """

    make: Callable[[Shape, Inputs], Arguments]
    formula: Callable[..., Any]
    call: Callable[..., Any] | None = None
    gradient: tuple[str, ...] = ()
    rtol: float = 1e-9
    shapes: tuple[str, ...] = ("48x64",)
    dtypes: tuple[str, ...] = ("float32",)
    quick: str = ""

    def of(self, name: str) -> Callable[..., Any]:
        """Return the function to call for the item `name`, such as "nn.hard_cap"."""
        module, item = name.split(".")
        return self.call or getattr(importlib.import_module(f"orthonorm.{module}"), item)

    def arguments(self, shape: Shape, inputs: Inputs) -> Arguments:
        """Make the arguments, with the power law in place of the default spectrum."""
        power_law = inputs.spectrum == "gaussian"
        return self.make(shape, inputs.but(spectrum="power-law") if power_law else inputs)


def matrices(*names: str, **keywords: Any) -> Callable[[Shape, Inputs], Arguments]:
    """Return a maker of named matrices of the shape, plus fixed keywords."""
    return lambda shape, inputs: {n: inputs.matrix(n, shape) for n in names} | keywords


def flat(results: Any) -> Iterator[Tensor]:
    """Yield the tensors and numbers of a result in float64."""
    if isinstance(results, Tensor):
        yield results.detach().double()
    elif isinstance(results, (int, float)):
        yield torch.tensor(float(results), dtype=torch.float64)
    else:
        for result in results:
            yield from flat(result)


def wide(value: Any) -> Any:
    """Return an argument with its numbers in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return type(value)(wide(v) for v in value) if isinstance(value, (list, tuple)) else value


def spectral(W: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Return U f(S) V^T by an SVD."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * f(s).unsqueeze(-2)) @ Vh


def first(s: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return singular values of which the largest is replaced by its `value`."""
    return torch.cat([value(s[..., :1]), s[..., 1:]], -1)


polar = functools.partial(spectral, f=torch.ones_like)


def orthonormal(inputs: Inputs, tag: str, *shape: int) -> Tensor:
    """Return a matrix with orthonormal columns."""
    return inputs.put(torch.linalg.qr(inputs.normal(tag, shape).double())[0])
