"""One row of what orthonorm.nn and orthonorm.monitor offer: arguments, and an independent formula.

`public.py` has the table. Tests hold every public item against its formula in float64 and check its
gradient; the benchmark times both.
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
    """A public item: what it is called with and what it must equal.

    Attributes:
        make: keyword arguments from the shape of a matrix, its singular values a power law unless
            said otherwise (so that power iteration arrives).
        formula: the same results from the same arguments, by SVD, eigh, autograd or definition, in
            plain torch.
        call: what calls the item with the arguments; None: the item itself does.
        gradient: arguments it is differentiable in.
        rtol: relative distance to the formula in float64, where an iteration ends before rounding.
        shapes, dtypes: of the benchmark.
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
        """The call of the item `name`, such as "nn.hard_cap"."""
        module, item = name.split(".")
        return self.call or getattr(importlib.import_module(f"orthonorm.{module}"), item)

    def arguments(self, shape: Shape, inputs: Inputs) -> Arguments:
        power_law = inputs.spectrum == "gaussian"
        return self.make(shape, inputs.but(spectrum="power-law") if power_law else inputs)


def matrices(*names: str, **keywords: Any) -> Callable[[Shape, Inputs], Arguments]:
    """A maker of matrices of the shape, and keywords as they are."""
    return lambda shape, inputs: {n: inputs.matrix(n, shape) for n in names} | keywords


def flat(results: Any) -> Iterator[Tensor]:
    """The tensors and numbers of a result, float64."""
    if isinstance(results, Tensor):
        yield results.detach().double()
    elif isinstance(results, (int, float)):
        yield torch.tensor(float(results), dtype=torch.float64)
    else:
        for result in results:
            yield from flat(result)


def wide(value: Any) -> Any:
    """An argument with its numbers in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return type(value)(wide(v) for v in value) if isinstance(value, (list, tuple)) else value


def spectral(W: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """U f(S) V^T."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * f(s).unsqueeze(-2)) @ Vh


def first(s: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Singular values with the largest changed."""
    return torch.cat([value(s[..., :1]), s[..., 1:]], -1)


polar = functools.partial(spectral, f=torch.ones_like)


def orthonormal(inputs: Inputs, tag: str, *shape: int) -> Tensor:
    """Orthonormal columns."""
    return inputs.put(torch.linalg.qr(inputs.normal(tag, shape).double())[0])
