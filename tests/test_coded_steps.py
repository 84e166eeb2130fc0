"""coded_adamw_step_ is dequantize_blocks_, adamw_step_ and quantize_blocks_ to the bit, in one pass
without averages in float32; and AdamW on 8-bit state is that op."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optimizer_rows import make, set_grads, snapshot
from orthonorm import optim
from orthonorm._library import LOADED, OPS, reference
from orthonorm.bench.inputs import Arguments, copied, map_tensors
from orthonorm.ops import adamw_step_, dequantize_blocks_, quantize_blocks_
from orthonorm.ops.blocks import BLOCK, scales_shape
from test_steps import under
from torch import Tensor, nn

OP = OPS["coded_adamw_step_"]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# one element, none, below and above one block and several; vectors, convolutions, a stack
SHAPES = [(1,), (), (0,), (3, 0), (17, 15), (16, 16), (1, 257), (33, 100), (5, 2, 3, 3), (8200,)]
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (BF16, F32), (F32, F64)]
AWKWARD = {
    "usual": lambda g: g,
    "zeros": lambda g: g * 0,
    "denormal": lambda g: g * 1e-41,
    "1e-40": lambda g: g * 1e-40,
    "1e36": lambda g: g * 1e36,
    "decades": lambda g: (
        g * torch.exp2(torch.linspace(-40, 0, g.numel(), dtype=g.dtype)).view_as(g)
    ),
    "nan": lambda g: torch.where(g == g.max(), float("nan"), g) if g.numel() else g,
    "inf": lambda g: torch.where(g == g.max(), -float("inf"), g) if g.numel() else g,
}
OPTIONS: list[Arguments] = [
    {},
    {"decay_first": False, "correct_eps": False},
    {"weight_decay": torch.tensor(0.0), "eps": 0.0},
    {"rounding": torch.tensor(7 << 40)},
    {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
    {"found_inf": torch.tensor([2.0]), "rounding": torch.tensor(7)},
]


def arguments(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    kind: str = "usual",
) -> Arguments:
    """Weights and gradients, and averages of earlier gradients as they are kept."""
    generator = torch.Generator().manual_seed(0)

    def each(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in shapes]

    made: Arguments = {"params": each(dtypes[0])}
    made["grads"] = [AWKWARD[kind](g.double()).to(dtypes[1]) for g in each(F64)]
    first, second = each(F32), [x.square() for x in each(F32)]
    for name, values, signed in (("exp_avg", first, True), ("exp_avg_sq", second, False)):
        rows = [x.reshape(1, x.numel()) for x in values]
        codes = [torch.zeros_like(x, dtype=torch.uint8) for x in rows]
        scales = [torch.zeros(scales_shape(x.shape)) for x in rows]
        quantize_blocks_(codes, scales, rows, signed)
        made[name] = [c.view(s) for c, s in zip(codes, shapes, strict=True)]
        made[f"{name}_scales"] = scales
    made["steps"] = [torch.tensor(float(i), dtype=(F32, F64)[i % 2]) for i in range(len(shapes))]
    rest = {"lr": torch.tensor(0.01), "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    return made | rest | {"weight_decay": torch.tensor(0.1, dtype=torch.float64)}


def unfused(
    params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor], steps: list[Tensor],
    lr: Tensor, *rest: Any, **more: Any,
) -> None:  # fmt: skip
    """The three ops on the whole list."""
    coded = ((exp_avg, exp_avg_scales, True), (exp_avg_sq, exp_avg_sq_scales, False))
    moments = []
    for codes, scales, signed in coded:
        rows = [w.new_empty(1, w.numel(), dtype=torch.promote_types(w.dtype, F32)) for w in params]
        dequantize_blocks_(rows, [c.reshape(1, c.numel()) for c in codes], scales, signed)
        moments.append([x.view(w.shape) for x, w in zip(rows, params, strict=True)])
    adamw_step_(params, grads, *moments, steps, lr, *rest, **more)
    if more.get("found_inf", torch.zeros(())).item():
        return
    for (codes, scales, signed), values in zip(coded, moments, strict=True):
        rows = [x.view(1, x.numel()) for x in values]
        new = [torch.empty(x.shape, dtype=torch.uint8) for x in rows]
        quantize_blocks_(new, scales, rows, signed)
        for c, n in zip(codes, new, strict=True):
            c.copy_(n.view(c.shape))


def same(a: Arguments, b: Arguments, note: Any = "") -> None:
    """Bit for bit but for the sign of NaN."""
    for name in [n for n in LISTS if n in a]:
        for i, (x, y) in enumerate(zip(a[name], b[name], strict=True)):
            assert x.dtype == y.dtype, (note, name, i)
            torch.testing.assert_close(
                x, y, rtol=0, atol=0, equal_nan=True, msg=f"{note} {name}[{i}]: {x} is not {y}"
            )


LISTS = ("params", "grads", "exp_avg", "exp_avg_sq", "exp_avg_scales", "exp_avg_sq_scales", "steps")


def check_bits(made: Arguments, note: Any = "") -> None:
    """The dispatched op against its definition, and against the three ops called on the list."""
    fused = [copied(made) for _ in range(3)]
    with torch.no_grad():
        for call, given in zip((OP, OP.definition, unfused), fused, strict=True):
            call(**given)
    same(fused[0], fused[1], note)
    same(fused[0], fused[2], note)


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_bits(dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    for i, option in enumerate(OPTIONS):
        check_bits(arguments(dtypes=dtypes, kind=kind) | option, i)


def check_kernels() -> None:
    """Less of the same, for kernels that are emulated; some go to the definition."""
    shapes = [*SHAPES[:8], (3, 8, 96), (1030,)]
    kinds, pairs = itertools.cycle(("usual", "nan", "1e-40")), itertools.cycle(DTYPES[:5])
    for option, kind, dtypes in zip(OPTIONS, kinds, pairs, strict=False):
        check_bits(arguments(shapes, dtypes, kind) | option, (kind, option))
    made = arguments([(6, 5, 11, 3), (4, 7, 3, 8), (48, 64), (33, 50)], (BF16, BF16))
    made["params"] = [LAYOUTS["cut"](t) for t in made["params"]]
    made["grads"] = [t.mT.contiguous().mT for t in made["grads"]]
    check_bits(made | {"rounding": torch.tensor(3)})


def cut(t: Tensor) -> Tensor:
    """The same numbers in every second column of wider rows."""
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)
    return wide[..., 1::2].copy_(t)


LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "cut": cut,
    "contiguous": lambda t: t,
}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bits_of_any_strides(dtype: torch.dtype) -> None:
    """Blocks are cut in row-major order whatever the strides of weights, gradients and codes."""
    for layouts in itertools.permutations(LAYOUTS, 3):
        made = arguments([(6, 5, 11, 3), (4, 7, 3, 8)], (dtype, dtype))
        names = ("params", "grads", "exp_avg", "exp_avg_sq")
        for name, layout in zip(names, (*layouts, layouts[0]), strict=True):
            made[name] = [LAYOUTS[layout](t) for t in made[name]]
        check_bits(made | {"rounding": torch.tensor(3)}, layouts)


def test_leading_dimensions_of_scales_cut_blocks() -> None:
    """Each matrix of a batch has blocks of its own: as if it was a tensor of the list."""
    shape, flat = (3, 9, 50), arguments([(9, 50)] * 3)
    stacked = {n: [torch.stack(flat[n])] for n in LISTS if n != "steps"}
    flat["steps"] = [torch.tensor(4.0) for _ in range(3)]
    stacked = flat | stacked | {"steps": [torch.tensor(4.0)]}
    flat["grads"][1][0, 0] = stacked["grads"][0][1, 0, 0] = float("nan")
    assert stacked["params"][0].shape == shape and stacked["exp_avg_scales"][0].shape == (3, 2)
    with torch.no_grad():
        OP(**flat)
        OP(**stacked)
    split = {n: [*stacked[n][0].unbind()] for n in LISTS if n != "steps"}
    same(split, flat)
    assert split["exp_avg_scales"][1].isnan().tolist() == [True, False]  # a block, not the matrix
    assert not any(split["exp_avg_scales"][i].isnan().any() for i in (0, 2))


def test_a_found_infinity_leaves_all_as_it_is() -> None:
    """To the bit, also codes that are not those of the numbers that they stand for."""
    made = arguments(kind="inf")
    for i, name in enumerate(("exp_avg", "exp_avg_sq")):
        for codes in made[name]:
            codes.copy_(torch.arange(codes.numel()).view(codes.shape) % (100 + i))
    before = copied(made)
    for call in (OP, OP.definition, OP.reference):
        call(**made, found_inf=torch.tensor(1.0))
        same(made, before, call)


def test_the_reference_is_the_composition_of_references() -> None:
    for option in OPTIONS:
        mine, theirs = arguments() | option, arguments() | option
        OP.reference(**mine)
        with reference():
            unfused(**theirs)
        same(mine, theirs)


def test_results_do_not_depend_on_threads_or_company() -> None:
    threads = torch.get_num_threads()
    made = arguments([(300, 301), (5,), (70, 1000)], (BF16, BF16))
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            given = copied(made)
            OP(**given)
            found.append(given)
    finally:
        torch.set_num_threads(threads)
    same(*found)
    for i in range(3):
        alone = {n: v[i : i + 1] if n in LISTS else v for n, v in copied(made).items()}
        OP(**alone)
        same(alone, {n: v[i : i + 1] if n in LISTS else v for n, v in found[0].items()})


def digest() -> str:
    """A hash of what the op writes."""
    found = hashlib.sha256()
    for kind, dtypes in itertools.product(("usual", "decades", "1e-40"), DTYPES):
        made = arguments(dtypes=dtypes, kind=kind)
        OP(**made)
        for t in (t for name in LISTS for t in made[name] if t.dim()):
            found.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    assert under(isa, "-c", "import test_coded_steps as t; print(t.digest())").strip() == digest()


def wrong(made: Arguments, name: str, value: Any) -> Arguments:
    return {**made, name: [made[name][0], value, *made[name][2:]]}


LIST = [(3, 4), (30, 10), (5,)]
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("params", torch.zeros(30, 10, dtype=torch.int32), TypeError, "params"),
    ("grads", torch.zeros(10, 30), ValueError, "grads"),
    ("exp_avg", torch.zeros(30, 10), TypeError, "exp_avg"),
    ("exp_avg", torch.zeros(300, dtype=torch.uint8), ValueError, "exp_avg"),
    ("exp_avg_sq", torch.zeros(30, 10, dtype=torch.int8), TypeError, "exp_avg_sq"),
    ("exp_avg_scales", torch.zeros(1), ValueError, "exp_avg_scales"),
    ("exp_avg_scales", torch.zeros(3), ValueError, "exp_avg_scales"),
    ("exp_avg_scales", torch.zeros(()), ValueError, "scales"),
    ("exp_avg_scales", torch.zeros(30, 10, 1, 1), ValueError, "scales"),
    ("exp_avg_scales", torch.zeros(2, dtype=torch.uint8), TypeError, "exp_avg_scales"),
    ("exp_avg_sq_scales", torch.zeros(30, 1), ValueError, "exp_avg_sq_scales"),
    ("exp_avg_sq_scales", torch.zeros(()), ValueError, "exp_avg_sq_scales"),
    ("exp_avg_sq_scales", torch.zeros(1).expand(2), ValueError, "exp_avg_sq_scales"),
    ("exp_avg", torch.zeros(1, 1, dtype=torch.uint8).expand(30, 10), ValueError, "exp_avg"),
    ("steps", torch.zeros(2), ValueError, "steps"),
    ("steps", torch.zeros((), dtype=torch.int64), TypeError, "steps"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "word"), BAD)
def test_bad_input(name: str, value: Any, error: type[Exception], word: str) -> None:
    """Refused by the op's check; the kernel's own checks hold where the first is passed by."""
    for call in (OP, OP.overload, OP.unchecked):
        made = wrong(arguments(LIST), name, value)
        before = {n: [t.clone() for t in made[n]] for n in LISTS}
        errors = error if call is OP else (ValueError, TypeError, RuntimeError)
        with pytest.raises(errors, match=f"coded_adamw_step_: .*{word}"):
            call(**made)
        same({n: made[n] for n in LISTS}, before)


@pytest.mark.parametrize("name", LISTS)
def test_unequal_lists(name: str) -> None:
    for call in (OP, OP.overload, OP.unchecked):
        made = arguments(LIST)
        made[name] = made[name][:2]
        with pytest.raises((ValueError, RuntimeError), match="coded_adamw_step_: lists must have"):
            call(**made)


def test_opcheck() -> None:
    torch.library.opcheck(OP.overload, (), arguments(LIST) | OPTIONS[3])


# ---- the optimizer -------------------------------------------------------------------------------
PARAMS = ((24, 40), (7,), (6, 5, 3, 3), ())


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    params = make(dtype, PARAMS)
    params[2] = nn.Parameter(params[2].detach().to(memory_format=torch.channels_last))
    return params


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.0, "maximize": True}])
def test_trajectories_are_those_of_the_three_ops(
    dtype: torch.dtype, stochastic: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for call in (None, unfused):
        if call:
            monkeypatch.setattr("orthonorm.optim.companion.coded_adamw_step_.unchecked", none_left)
        params = parameters(dtype)
        opt = optim.AdamW(
            params, lr=0.01, state_dtype="8bit", stochastic_rounding=stochastic, **settings
        )
        for step in range(5):
            set_grads(step, params)
            opt.step()
        found.append((params, snapshot(opt)))
    (a, x), (b, y) = found
    assert all(map(torch.equal, a, b)) and all(map(torch.equal, x, y))


def none_left(params: list[Tensor], *rest: Any) -> None:
    """`unfused` with the arguments of the op in their order, found_inf None."""
    names = ("decay_first", "correct_eps", "rounding", "grad_scale")
    assert rest[-1] is None
    unfused(params, *rest[:11], **dict(zip(names, rest[11:-1], strict=True)))


def allocated(f: Any) -> int:
    """Bytes that torch allocates on the CPU while it runs."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        f()
    events = profile.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


@pytest.mark.skipif(("coded_adamw_step_", "CPU") not in LOADED.served, reason="needs a kernel")
def test_a_step_needs_no_averages_in_float32() -> None:
    """Not a hundredth of them, where the three ops allocate all."""
    params = make(F32, ((300, 400), (5000,)))
    opt = optim.AdamW(params, state_dtype="8bit")
    set_grads(0, params)
    opt.step()
    size = 4 * sum(p.numel() for p in params)
    assert allocated(opt.step) < size / 100
    made = arguments([tuple(p.shape) for p in params])
    assert allocated(lambda: OP(**made)) < size / 100
    assert allocated(lambda: unfused(**made)) >= 2 * size


def test_saved_state_goes_on() -> None:
    """A state dict of before is read: names, shapes and meaning of the state are the same."""
    params = parameters(F32)
    opt = optim.AdamW(params, state_dtype="8bit")
    set_grads(0, params)
    opt.step()
    for p in params:
        state = opt.state[p]
        blocks = (-(-p.numel() // BLOCK),)
        assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg"].shape == p.shape
        assert state["exp_avg"].is_contiguous() and state["exp_avg_sq_scales"].shape == blocks
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = optim.AdamW(twins, state_dtype="8bit")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    set_grads(1, params, twins)
    opt.step()
    other.step()
    assert all(map(torch.equal, params, twins))
    assert all(map(torch.equal, snapshot(opt), snapshot(other)))


def test_a_scaler_skips_on_the_device() -> None:
    """`fused=True` leaves scale and found_inf to the step."""
    params = parameters(F32)
    opt = optim.AdamW(params, state_dtype="8bit", fused=True)
    assert opt._step_supports_amp_scaling
    set_grads(0, params)
    opt.step()
    before = map_tensors([p.detach() for p in params] + snapshot(opt), torch.clone)
    opt.found_inf, opt.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    set_grads(1, params)
    opt.step()
    assert all(map(torch.equal, [p.detach() for p in params] + snapshot(opt), before))
