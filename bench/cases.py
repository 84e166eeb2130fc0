"""The one table of cases: a row per op and per optimizer step, read by tests and benchmarks.

A row has the maker of an op's arguments from shapes, the op's FLOPs, the arguments that it must
read twice, the keyword variants that tests run, and the shapes and dtypes of the benchmark. The
schema of the op says which arguments it mutates. The oracle is the op's reference on the arguments
in float64 (`inputs.doubled`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from orthonorm._library import OPS, Op
from torch import Tensor

from . import makers, work
from .inputs import Arguments, Inputs
from .makers import KELLER, Make
from .shapes import Workload

CUBIC = [1.5, -0.5, 0.0] * 4
BOTH = ("float32", "bfloat16")
SMALL = ("500x32x32", "500x64x64", "64x128x128")
LARGE = ("768x3072", "768x2304", "1024x4096", "2048x2048", "12x768x768")

Outputs = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One op: its arguments, its work and its benchmark workloads.

    Attributes:
        make: makes arguments from a list of shapes (an op on one matrix gets a list of one).
        flops: nominal floating-point operations of one call, 0 for memory-bound ops.
        reread: arguments that every kernel must read twice (a reduction, then scaling by it).
        written: mutated arguments that are written but not read.
        maps: True if it returns a tensor of its input's size.
        variants: keyword sets that tests run in addition to the defaults.
        scale_free: True if every finite input gives a finite result, whatever its scale.
        shapes: benchmark workloads by name; dtypes: benchmark dtypes by name.
        quotients: outputs that are divided by result0, one number per matrix, and share its error.
            They are judged after multiplication by it.
        rounded: outputs of codes that results of arithmetic are rounded to.
        limit: longest side that all kernels of the op take.
        polar: True if the result approximates the polar factor of "X".
        quick: workload of the quick suite; empty takes the first of `shapes`.
    """

    name: str
    make: Make
    flops: Callable[[Arguments], float] = lambda _: 0.0
    reread: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    maps: bool = False
    variants: tuple[Arguments, ...] = ()
    scale_free: bool = False
    shapes: tuple[str, ...] = ("gpt2-small-3",)
    dtypes: tuple[str, ...] = BOTH
    quotients: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    limit: int | None = None
    polar: bool = False
    quick: str = ""

    @property
    def op(self) -> Op[..., Any]:
        return OPS[self.name]

    @property
    def schema(self) -> Any:
        return self.op.overload._schema

    @property
    def mutated(self) -> tuple[str, ...]:
        """Names of the arguments that the op writes, without optional ones."""
        always = [a for a in self.schema.arguments if not a.has_default_value()]
        return tuple(a.name for a in always if a.alias_info and a.alias_info.is_write)

    @property
    def takes_list(self) -> bool:
        return str(self.schema.arguments[0].type) == "List[Tensor]"

    def calls(self, workload: Workload, inputs: Inputs, **keywords: Any) -> list[Arguments]:
        """Return the arguments of the calls of a workload: one for a list op, else one per shape.

        A keyword that is a function is called with the arguments made so far.
        """
        lists = [workload.shapes] if self.takes_list else [(s,) for s in workload.shapes]
        calls = []
        for i, shapes in enumerate(lists):
            made = self.make(shapes, inputs.but(seed=inputs.seed + i))
            for name, value in keywords.items():
                made[name] = value(made) if callable(value) else value
            calls.append(made)
        return calls

    def outputs(self, arguments: Arguments, results: Any) -> Outputs:
        """Return all tensors that the op returned or wrote, by name."""
        found = {name: as_list(arguments[name]) for name in self.mutated}
        if isinstance(results, tuple):
            found |= {f"result{i}": as_list(r) for i, r in enumerate(results)}
        elif results is not None:
            found["result"] = as_list(results)
        return found


def as_list(value: Any) -> list[Tensor]:
    """Return a tensor, or a list or tuple of tensors, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def tensors(arguments: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Return the tensor arguments by name, each as a list."""
    found = {}
    for name, value in arguments.items():
        values = as_list(value)
        if values and all(isinstance(v, Tensor) for v in values):
            found[name] = values
    return found


# ---- the table -----------------------------------------------------------------------------------
_EPS_AT = ({"eps_at": "inside", "keep_norm": False}, {"eps_at": "clamp", "eps": 0.5})
_DIVISORS = (
    {"scale": 3.0, "eps": 0.5}, {"eps": 0.5, "eps_at": "inside"}, {"eps": 4.0, "eps_at": "clamp"},
)  # fmt: skip
_FORMS = (
    {"form": "direct", "precision": "full"},
    {"form": "gram", "precision": "float32", "restarts": [3]},
    {"form": "direct", "precision": "bfloat16"},
    {"scale": "schatten4", "eps": 1e-7, "precision": "full"},
    {"scale": "aol", "safety": 1.05, "precision": "full"},
    {"coefficients": CUBIC, "restarts": [], "precision": "full"},
    {"norms": makers.norms},
)
_WORDS = ("768x3072", "2048x2048", "12x768x768", "64x128x128")
_ROTATED = ("768x3072", "3072x768", "768x768", "64x128x128")
_MODEL = ("gpt2-small-3", "gpt2-small")
_STATES = (*BOTH, "mixed")

_ROWS = (
    # K1: the words of the algorithm, then whole polynomials
    Case("gram", makers.matrix("X"), work.gram, shapes=_WORDS),
    Case(
        "symmetric_update", makers.symmetric_update, work.update,
        variants=({"alpha": 1.0, "beta": 0.0},), shapes=("768x768", "2048x2048", "64x128x128"),
    ),
    Case("gram_update_", makers.gram_update, work.gram, shapes=_WORDS),
    Case("apply", makers.apply, work.gram, variants=({"a": 0.0, "b": 1.0},), shapes=_WORDS),
    Case(
        "gram_polynomial", makers.gram_polynomial, work.gram_polynomial,
        variants=({"coefficients": CUBIC}, {"coefficients": CUBIC[:3]}),
        shapes=("768x768", "2048x2048", "12x768x768"),
    ),
    Case(
        "direct_polynomial", makers.direct_polynomial, work.direct_polynomial,
        variants=({"coefficients": CUBIC},), shapes=("768x3072", "2048x2048", "12x768x768"),
        quick="384x1536",
    ),
    Case(
        "gram_form", makers.gram_form, work.direct_polynomial,
        variants=({"coefficients": CUBIC, "restarts": [1, 3]},),
        shapes=("768x3072", "1024x4096", "12x768x768"), quick="384x1536",
    ),
    Case(
        "polar_iteration", makers.polar_iteration, work.polar_iteration, scale_free=True,
        shapes=("768x768", "64x128x128"), quick="16x128x128",
    ),
    Case(
        "scaled_polynomial_", makers.scaled_polynomial, work.direct_polynomial,
        variants=({"gram": True, "restarts": [2]}, {"coefficients": CUBIC},
                  {"source": makers.source}),
        shapes=("768x3072", "2048x2048", "12x768x768"), quick="384x1536",
    ),
    Case("divide_each", makers.divide_each, maps=True, scale_free=True),
    Case(
        "small_newton_schulz", makers.small_newton_schulz, work.polynomial, scale_free=True,
        variants=({"eps": 1e-7, "safety": 1.05}, {"coefficients": CUBIC},
                  {"norms": makers.norms, "dtype": torch.float32}),
        shapes=SMALL, limit=128, polar=True, quick="100x32x32",
    ),
    Case(
        "newton_schulz", makers.newton_schulz, work.polynomial, scale_free=True, variants=_FORMS,
        shapes=SMALL + LARGE, polar=True, quick="64x128x128",
    ),
    Case(
        "newton_schulz_", makers.newton_schulz, work.polynomial, scale_free=True, variants=_FORMS,
        shapes=SMALL + LARGE, quick="64x128x128",
    ),
    # K2: second moments and normalization
    Case(
        "rotated_adam_", makers.rotated_adam, dtypes=_STATES,
        variants=({"eps": 0.0}, {"scales": makers.scales}),
    ),
    Case(
        "row_moment_", makers.moments("moments", ""), reread=("X",), variants=_EPS_AT,
        dtypes=_STATES,
    ),
    Case(
        "column_moment_", makers.moments("", "moments"), reread=("X",), variants=_EPS_AT,
        dtypes=_STATES,
    ),
    Case(
        "factored_moment_", makers.moments("row_moments", "column_moments"), reread=("X",),
        variants=_EPS_AT, dtypes=_STATES,
    ),
    Case(
        "elementwise_moment_", makers.elementwise_moment, dtypes=_STATES,
        variants=({"eps": 0.0}, {"corrections": makers.scales}),
    ),
    Case("row_normalize", makers.matrix("X"), maps=True, scale_free=True, variants=_DIVISORS),
    Case(
        "column_normalize", makers.matrix("X"), reread=("X",), maps=True, scale_free=True,
        variants=_DIVISORS,
    ),
    Case("rotate_", makers.rotate, work.basis, written=("out",), shapes=_ROTATED),
    Case(
        "rotate_back_", makers.rotate_back, work.basis, shapes=_ROTATED,
        variants=({"decay": None},),
    ),
    # K3: spectral norms
    Case(
        "power_iteration_", makers.power_iteration, scale_free=True, shapes=_MODEL,
        variants=({"steps": 3, "order": "v_first"}, {"steps": 0}, {"eps": 1e-12}),
    ),
    Case(
        "spectral_normalization_", makers.spectral_normalization, written=("out",),
        quotients=("out",), scale_free=True, shapes=_MODEL,
        variants=({"steps": 3, "order": "v_first", "eps": 1e-12}, {"steps": 0}),
    ),
    Case(
        "spectral_normalization_gradient", makers.spectral_normalization_gradient,
        scale_free=True, shapes=_MODEL,
    ),
    Case(
        "spectral_norm", makers.matrix("W", steps=8), work.norm, scale_free=True,
        variants=({"steps": 1},), quick="768x3072",
    ),
    Case(
        "gram_iteration", makers.matrix("W"), work.gram_iteration, scale_free=True,
        variants=({"steps": 0}, {"steps": 2}), quick="768x768",
    ),
    # steps on lists of parameters and their passes
    Case("magnitude", makers.magnitude, scale_free=True, shapes=_MODEL),
    Case("inner", makers.inner, dtypes=_STATES),
    Case("sign_", makers.magnitude, scale_free=True),
    Case("mean_sinh_square", makers.mean_sinh_square, scale_free=True),
    Case(
        "normalize_columns_", makers.normalize_columns, reread=("X",), written=("out",),
        scale_free=True, variants=({"eps": 0.5},),
    ),
    Case(
        "quantize_blocks_", makers.quantize_blocks, written=("codes", "scales"),
        dtypes=("float32",), variants=({"signed": False},), shapes=_MODEL, quick="llama-3m",
    ),
    Case(
        "dequantize_blocks_", makers.dequantize_blocks, written=("out",), dtypes=("float32",),
        variants=({"signed": False},), shapes=_MODEL, quick="llama-3m",
    ),
    Case(
        "muon_prologue_", makers.muon_prologue, written=("updates",), dtypes=_STATES,
        variants=({"nesterov": False},),
    ),
    Case(
        "decayed_update_", makers.decayed_update, dtypes=_STATES, shapes=_MODEL,
        variants=({"weight_decay": makers.no_decay, "factors": makers.factors},
                  {"rounding": makers.seed}),
    ),
    Case("accumulate_", makers.accumulate, written=("sizes",), dtypes=_STATES),
    Case("take_rows_", makers.take_rows, written=("out",)),
    Case(
        "update_rows_", makers.update_rows, dtypes=_STATES,
        variants=({"weight_decay": makers.no_decay, "factors": makers.factors},),
    ),
    Case(
        "adamw_step_", makers.adamw_step, dtypes=_STATES,
        variants=({"decay_first": False, "correct_eps": False},
                  {"weight_decay": makers.no_decay, "eps": 0.0}, {"rounding": makers.seed}),
    ),
    Case(
        "coded_adamw_step_", makers.coded_adamw_step, rounded=("exp_avg", "exp_avg_sq"),
        variants=({"decay_first": False, "correct_eps": False},
                  {"weight_decay": makers.no_decay, "eps": 0.0}, {"rounding": makers.seed}),
        quick="llama-3m",
    ),
    Case(
        "signum_step_", makers.signum_step, dtypes=_STATES,
        variants=({"nesterov": True, "weight_decay": makers.no_decay, "factors": makers.factors},),
    ),
    Case(
        "muon_step_", makers.muon_step, work.polynomial, dtypes=_STATES,
        variants=({"nesterov": False, "precision": "full", "factors": makers.factors},
                  {"form": "gram", "eps": 1e-7, "restarts": [3]}, {"rounding": makers.seed}),
        shapes=("gpt2-small-3", "llama-3m"), quick="llama-3m",
    ),
    Case(
        "normuon_step_", makers.normuon_step, work.polynomial, dtypes=_STATES,
        variants=({"precision": "full", "factors": makers.factors, "norm_eps": 0.5},),
        shapes=("gpt2-small-3", "llama-3m"), quick="llama-3m",
    ),
    Case(
        "conda_step_", makers.conda_step, work.rotation, dtypes=_STATES,
        variants=({"weight_decay": makers.no_decay},), shapes=("gpt2-small-3", "llama-3m"),
        quick="llama-3m",
    ),
)  # fmt: skip
CASES: dict[str, Case] = {case.name: case for case in _ROWS}


@dataclass(frozen=True)
class Step:
    """One optimizer's step: its class in orthonorm.optim and its work per step.

    Attributes:
        name: its name on the command line.
        optimizer: its class name, also the key in `orthonorm.optim.REGISTRY`.
        settings: constructor arguments that peers share; own: those that only ours takes.
        flops: nominal operations of one matrix; states: matrices of state per parameter.
    """

    name: str
    optimizer: str
    settings: Mapping[str, Any]
    own: Mapping[str, Any] = field(default_factory=dict)
    flops: Callable[[Tensor], float] = lambda _: 0.0
    states: int = 1
    shapes: tuple[str, ...] = ("llama-3m", "gpt2-small-3")
    dtypes: tuple[str, ...] = ("float32",)
    quick: str = ""  # workload of the quick suite; empty takes the first of `shapes`


def _relative(optimizer: str, lr: float, states: int = 1, polynomial: bool = True) -> Step:
    """Make the row of an optimizer without peers; `polynomial`: each step takes polar factors."""
    flops: Callable[[Tensor], float] = (
        (lambda w: work.polynomial({"X": [w], "coefficients": KELLER}))
        if polynomial
        else (lambda _: 0.0)
    )
    return Step(
        optimizer.lower(), optimizer, {"lr": lr}, flops=flops, states=states,
        quick="16x128x128",
    )  # fmt: skip


STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        Step(
            "muon", "Muon", {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95},
            flops=lambda w: work.polynomial({"X": [w], "coefficients": KELLER}),
        ),
        Step(
            "conda", "Conda", {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8},
            own={"scale": 0.25, "update_proj_gap": 10**9},  # its only refresh is in the warm-up
            flops=lambda w: work.rotation({"params": [w]}), states=2,
        ),
        Step(
            "adamw", "AdamW",
            {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}, states=2,
        ),
        _relative("NorMuon", 0.02),
        _relative("AdaMuon", 0.02, states=2),
        _relative("MuonEq", 1e-3),
        _relative("PolarGrad", 0.02),
        _relative("AdaGO", 0.05),
        _relative("AuON", 0.24, polynomial=False),
        _relative("HybridAuON", 0.24),
        _relative("TrustRegion", 1e-3),
        _relative("Scion", 1e-3),
        _relative("ScionLight", 1e-3),
        _relative("SteepestDescent", 0.01),
        _relative("Signum", 1e-3, polynomial=False),
        _relative("SWAN", 1e-3, states=0),
        _relative("SCALE", 1e-3, polynomial=False),
        _relative("SOAP", 3e-3, states=2, polynomial=False),
        _relative("Shampoo", 1e-3, polynomial=False),
        _relative("SPlus", 0.1, polynomial=False),
        _relative("Dion", 0.01, polynomial=False),
        _relative("Dion2", 0.01, polynomial=False),  # it orthogonalizes a quarter of the rows
        _relative("SSO", 1e-3),
        _relative("StiefelAdam", 1e-3, states=2, polynomial=False),
    )
}  # fmt: skip
NAMES = (*CASES, *STEPS)
