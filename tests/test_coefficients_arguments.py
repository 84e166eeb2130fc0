"""Schedules: what names them, what is refused, and that the module needs nothing."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from orthonorm import coefficients as k
from orthonorm.coefficients import COEFFICIENTS, resolve


def test_resolve_names_triples_and_lists() -> None:
    assert (
        resolve("quintic")
        == resolve("you5")
        == COEFFICIENTS["you5"].__class__(
            **{**dataclasses.asdict(COEFFICIENTS["you5"]), "past_end": "error"}
        )
    )
    assert resolve("simple").triples == resolve(k.KELLER).triples == (k.KELLER,) * 5
    assert resolve([3.4445, -4.775, 2.0315], 7).triples == (k.KELLER,) * 7
    assert resolve([(2, -1.5, 0.5), [1, 0, 0]]).triples == ((2.0, -1.5, 0.5), (1.0, 0.0, 0.0))
    assert resolve([(2, -1.5, 0.5)], 1).default_steps == 1
    pe = resolve("polar_express")
    assert len(pe.triples) == 5 and pe.restarts == (2,) and pe.measured == ((3,),)
    assert len(resolve("polar_express", 8).triples) == 8
    assert resolve("polar_express", 10).triples[8:] == ((1.875, -1.25, 0.375),) * 2
    old = resolve("polar_express_old", 9).triples  # cycles
    assert old[8] == old[0] != old[7]
    again = resolve(resolve("polar_express", 3))
    assert len(again.triples) == 3 and again.restarts is None and again.measured == ()
    assert resolve(pe, 4).triples == pe.triples[:4]
    assert resolve("polar_express_1.02").safety == 1.02
    assert set(k.ALIASES.values()) <= set(COEFFICIENTS)
    assert not set(k.ALIASES) & set(COEFFICIENTS)


KELLER = COEFFICIENTS["keller"]
ERRORS = [
    (lambda: resolve("muno"), ValueError, "name must be one of .*keller.*you5.*, got 'muno'"),
    (lambda: resolve(5), TypeError, "a list of triples or Coefficients, got int"),
    (lambda: resolve(None), TypeError, "got NoneType"),
    (lambda: resolve([(1.0, 2.0, 3.0), "abc"]), TypeError, "got str"),
    (lambda: resolve([(1.0, "2", 3.0)]), TypeError, "must hold numbers, got"),
    (lambda: resolve((1.0, 2.0)), ValueError, r"must be \(a, b, c\), got \(1.0, 2.0\)"),
    (lambda: resolve([(1, 2, 3, 4)]), ValueError, r"must be \(a, b, c\), got \(1, 2, 3, 4\)"),
    (lambda: resolve((1.0, math.nan, 0.0)), ValueError, "must be finite, got .*nan"),
    (lambda: resolve([(1.0, 0.0, math.inf)]), ValueError, "must be finite, got .*inf"),
    (lambda: resolve([]), ValueError, "got"),
    (lambda: resolve([(1, 0, 0)] * 100), ValueError, "1 to 99 triples, got 100"),
    (lambda: resolve("keller", 0), ValueError, r"steps must be in \[1, 99\], got 0"),
    (lambda: resolve("keller", 100), ValueError, r"steps must be in \[1, 99\], got 100"),
    (lambda: resolve("keller", 5.0), TypeError, "steps must be an int, got 5.0"),
    (lambda: resolve("keller", True), TypeError, "steps must be an int, got True"),
    (lambda: resolve("cubic5", 6), ValueError, "cubic5 runs at most 5 steps, got 6"),
    (lambda: resolve([(1, 0, 0)] * 3, 4), ValueError, "None or the 3 triples given, got 4"),
    (
        lambda: k.check_safe(KELLER, dtype="fp16", form="gram"),
        ValueError,
        "dtype must be one of float16, .*, got 'fp16'",
    ),
    (
        lambda: k.check_safe(KELLER, dtype="float16", form="auto"),
        ValueError,
        "form must be one of direct, gram, got 'auto'",
    ),
    (
        lambda: k.check_safe(KELLER, dtype="float16", form="gram", restarts=(5,)),
        ValueError,
        r"restarts must increase within \[1, 4\], got \(5,\)",
    ),
    (lambda: k.gram_condition(KELLER.steps(), (2, 2)), ValueError, r"increase .* got \(2, 2\)"),
    (lambda: k.gram_condition(KELLER.steps(), (0,)), ValueError, r"increase .* got \(0,\)"),
    (lambda: k.gram_condition(KELLER.steps(), (), 1e-3), ValueError, "lambda_min .* got 0.001"),
    (lambda: k.best_restarts(KELLER.steps(), 5), ValueError, r"count must be in \[0, 5\), got 5"),
    (lambda: k.default_restarts(KELLER, "half"), ValueError, "dtype must be one of .* got 'half'"),
    (lambda: k.image(KELLER.steps(), 1.0, 0.5), ValueError, r"low <= high, got \[1.0, 0.5\]"),
    (lambda: k.polar_express(lower=0.0), ValueError, r"lower must be in \[1e-12, 1\), got 0.0"),
    (lambda: k.polar_express(cushion=1.0), ValueError, r"cushion must be in \[0, 1\), got 1.0"),
    (lambda: k.polar_express(safety=0.9), ValueError, r"safety must be in \[1, 2\), got 0.9"),
    (lambda: dataclasses.replace(KELLER, safety=0.0), ValueError, "safety must be positive, got 0"),
    (lambda: dataclasses.replace(KELLER, past_end="stop"), ValueError, "past_end must be one of"),
    (lambda: dataclasses.replace(KELLER, prescale="none"), ValueError, "prescale must be one of"),
    (lambda: dataclasses.replace(KELLER, restarts=(7,)), ValueError, r"increase .* got \(7,\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_rule_and_the_value(call, error, message: str) -> None:
    with pytest.raises(error, match=f"^coefficients: .*{message}"):
        call()


def test_the_module_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, types; p = types.ModuleType('orthonorm'); p.__path__ = [sys.argv[1]];"
        "sys.modules['orthonorm'] = p; from orthonorm.coefficients import *;"
        "default_restarts(COEFFICIENTS['keller'], 'float16');"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(k.__file__).parent)], check=True)
