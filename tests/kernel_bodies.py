"""The bodies of test_ops.py that run on kernels under emulation: few, small and awkward inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import test_ops
from orthonorm.bench.cases import Case
from orthonorm.bench.inputs import DTYPES, Arguments, Inputs
from test_ops import Shapes, check_numbers


def bodies(
    served: Sequence[Case],
    dtypes: Callable[[Case], Iterable[str]],
    shapes: Callable[[Case], tuple[Shapes, ...]],
    usual: str = "float32",
) -> type:
    """A class of tests of the served cases; `usual` is the dtype of what is not about dtypes."""
    each = pytest.mark.parametrize("case", served, ids=lambda c: c.name)
    errors = [pytest.param(c, d, id=f"{c.name}-{d}") for c in served for d in dtypes(c)]
    variants = [
        pytest.param(c, v, id=f"{c.name}-{i}") for c in served for i, v in enumerate(c.variants)
    ]

    class Bodies:
        @pytest.mark.parametrize(("case", "dtype"), errors)
        def test_error(self, case: Case, dtype: str) -> None:
            for some in shapes(case):
                check_numbers(case, some, Inputs.named(dtype))

        @pytest.mark.parametrize(("case", "variant"), variants)
        def test_variant(self, case: Case, variant: Arguments) -> None:
            several = ((2, 9, 20), (20, 9))
            if "dtype" in variant:
                variant = {**variant, "dtype": DTYPES[usual]}
            for some in (several,) if case.takes_list else (((20, 9),), ((9, 20),)):
                check_numbers(case, some, Inputs.named(usual, seed=1), **variant)

        @each
        def test_empty(self, case: Case) -> None:
            for shape in test_ops.EMPTY:
                test_ops.test_empty(case, shape, usual)

        @each
        def test_zero(self, case: Case) -> None:
            test_ops.test_zero(case, usual)

        @pytest.mark.parametrize("case", [c for c in served if c.scale_free], ids=lambda c: c.name)
        @pytest.mark.parametrize("scale", [2.0**-133, 2.0**119])
        def test_scale(self, case: Case, scale: float) -> None:
            test_ops.test_scale(case, usual, scale)

        @each
        @pytest.mark.parametrize("scale", [1e-40, 1e36], ids=["1e-40", "1e36"])
        def test_finite_stays_a_number(self, case: Case, scale: float) -> None:
            test_ops.test_finite_stays_a_number(case, scale, usual)

        @each
        def test_nonfinite_stays_inside(self, case: Case) -> None:
            test_ops.test_nonfinite_stays_inside(case, ((3, 9, 14),), float("nan"), usual)
            if case.takes_list:
                test_ops.test_nonfinite_stays_inside(case, ((9, 14),) * 3, float("inf"), usual)

    return Bodies
