"""Spectral normalization of layers: compiled, copied, sharded, removed, and given bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from orthonorm import nn as on
from spectral_layers import (
    found,
    inputs,
    net,
    original,
    theirs,
    twins,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


# ---- compile, copies, removal --------------------------------------------------------------------
def test_compiled_is_eager() -> None:
    """One graph, with the buffers updated in it."""
    _, b = twins()
    c = copy.deepcopy(b)
    compiled = torch.compile(c, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        want, got = b(inputs()), compiled(inputs())
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        want.sum().backward(), got.sum().backward()
    for p, q in zip(b.parameters(), c.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)
    for x, y in zip(b.buffers(), c.buffers(), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-11, atol=1e-12)


def test_deep_copies_are_independent() -> None:
    _, b = twins()
    c = copy.deepcopy(b)
    before = [x.clone() for x in b.buffers()]
    c(inputs())
    assert all(torch.equal(x, y) for x, y in zip(before, b.buffers(), strict=True))
    on.remove_spectral_norm(c)
    b(inputs())
    assert found(b) and not found(c)


def test_average_with_refreshed_vectors() -> None:
    """An EMA of weights and buffers: u and v are averages until they are refreshed."""
    _, b = twins()
    ema = torch.optim.swa_utils.AveragedModel(
        b, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    for _ in range(3):
        with torch.no_grad():
            for p in b.parameters():
                p.copy_(torch.randn_like(p))
        b(inputs())
        ema.update_parameters(b)
    on.refresh_vectors_(ema.module, 500)
    ema.eval()
    for _, m, name, _ in found(ema.module):
        matrix = getattr(m, name)
        matrix = matrix.movedim(int(isinstance(m, nn.ConvTranspose2d)), 0).flatten(1)
        assert abs(torch.linalg.matrix_norm(matrix, 2) - 1) <= 1e-6


def test_average_without_buffers_leaves_the_vectors_out() -> None:
    """The default averages parameters only: u and v are the model's own, of length 1."""
    _, b = twins()
    ema = torch.optim.swa_utils.AveragedModel(b)
    for _ in range(3):
        with torch.no_grad():
            for p in b.parameters():
                p.add_(torch.randn_like(p))
        b(inputs())
        ema.update_parameters(b)
    ema.eval()
    for (_, m, name, p), (_, _, _, q) in zip(found(ema.module), found(b), strict=True):
        assert torch.equal(p._u, q._u) and torch.equal(p._v, q._v)
        assert abs(p._u.norm() - 1) <= 1e-12
        matrix = getattr(m, name).movedim(p.dim, 0).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2) >= 1 - 1e-12  # sigma is a lower bound
    on.refresh_vectors_(ema.module, 500)
    _, m, name, p = found(ema.module)[-1]
    assert abs(torch.linalg.matrix_norm(getattr(m, name), 2) - 1) <= 1e-6


def test_removal_leaves_the_weight_of_evaluation() -> None:
    for order in ("u_first", "v_first"):
        _, b = twins(order)
        b(inputs())
        b.eval()
        want = b(inputs())
        b.train()
        assert on.remove_spectral_norm(b) is b
        assert sorted(b.state_dict()) == sorted(net().state_dict())
        torch.testing.assert_close(b(inputs()), want, rtol=1e-13, atol=1e-13)
        assert not b._forward_pre_hooks and not b._forward_hooks
        assert not b[0]._load_state_dict_pre_hooks and not b[0]._state_dict_hooks
        with pytest.raises(ValueError, match="no spectral norm"):
            on.remove_spectral_norm(b)
        on.spectral_norm_(b)


class Blocks(nn.Module):
    """Two layers, checkpointed or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for _ in range(2):  # which share layers, and so what a group has computed of them
            if self.reentrant is None:
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_meets_the_same_weights_again(reentrant: bool) -> None:
    """What is recomputed in the backward takes no further power step."""
    plain, again = Blocks(None).double(), Blocks(reentrant).double()
    for m in (plain, again):
        on.spectral_norm_(m)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(3, 8, dtype=torch.float64)
    for m in (plain, again):
        m(x).square().sum().backward()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-13, atol=1e-14)
    for y, z in zip(plain.buffers(), again.buffers(), strict=True):
        assert torch.equal(y, z)
    before = again.a.weight  # outside a backward the layer takes its own step
    assert not torch.equal(before, again.a.weight)
    copy.deepcopy(again)(x).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_single_layers_takes_no_step(reentrant: bool) -> None:
    m = Blocks(reentrant).double()
    for layer in (m.a, m.b):
        on.spectral_norm(layer)
    y = m(torch.randn(3, 8, dtype=torch.float64))
    before = [x.clone() for x in m.buffers()]
    y.sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(before, m.buffers(), strict=True))
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_results_use_their_memory_again_unless_somebody_keeps_them() -> None:
    m = on.spectral_norm_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 3)))
    x, places = torch.randn(5, 8), []
    seen = []
    m[1].register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    m(x).sum().backward()
    place = seen.pop().data_ptr()
    for _ in range(3):
        m(x).sum().backward()
        places.append(seen.pop().data_ptr())
    assert places == [place] * 3
    loss = m(x).square().sum()  # whose graph and weight are kept
    kept, want = seen[0], seen[0].detach().clone()
    for _ in range(3):
        with torch.no_grad():
            m[1].parametrizations.weight.original.add_(1e-3)
            m(x)
    assert torch.equal(kept, want) and seen[1].data_ptr() != kept.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    a, b = (on.spectral_norm_(nn.Linear(3, n)) for n in (0, 2))
    assert a(torch.randn(2, 3)).shape == (2, 0) and b(torch.randn(2, 3)).shape == (2, 2)


def test_functional_gradients() -> None:
    m = on.spectral_norm_(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()).eval()
    x, params = torch.randn(2, 4, dtype=torch.float64), dict(m.named_parameters())
    f = lambda p: torch.func.functional_call(m, p, (x,)).square().sum()  # noqa: E731
    got = torch.func.grad(f)({k: v.detach() for k, v in params.items()})
    f(params).backward()
    for name, p in params.items():
        torch.testing.assert_close(got[name], p.grad)


@pytest.mark.parametrize("together", [True, False])
def test_gradients_of_each_sample(together: bool) -> None:
    m = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    for part in [m] if together else [m[0], m[2]]:
        (on.spectral_norm_ if together else on.spectral_norm)(part)
    x, params = torch.randn(6, 4, dtype=torch.float64), dict(m.eval().named_parameters())

    def loss(params: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(m, params, (one,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    got = each({k: v.detach() for k, v in params.items()}, x)
    for i, one in enumerate(x):
        want = torch.autograd.grad(loss(params, one), list(params.values()))
        for name, gradient in zip(params, want, strict=True):
            torch.testing.assert_close(got[name][i], gradient)


def test_tied_weights_and_attention() -> None:
    """A tied parameter stays one parameter; attention's packed projection by its name."""
    embedding, head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
    head.weight = embedding.weight
    m = on.spectral_norm_(nn.Sequential(embedding, head), n_power_iterations=100)
    m(torch.arange(4)).sum().backward()
    assert original(head) is embedding.weight and len(list(m.parameters())) == 1
    attention = nn.MultiheadAttention(8, 2)
    on.spectral_norm(attention, "in_proj_weight", n_power_iterations=100)
    x = torch.randn(3, 1, 8)
    attention(x, x, x)[0].sum().backward()
    assert abs(torch.linalg.matrix_norm(attention.in_proj_weight, 2) - 1) <= 1e-4


def test_one_layer_of_a_group_may_go() -> None:
    _, b = twins()
    parametrize.remove_parametrizations(b[4], "weight")
    b(inputs()).sum().backward()
    assert b[4].weight.grad is not None and len(found(b)) == 3


def test_survives_sgd() -> None:
    """Parameters keep their identity, so an optimizer made before sees them."""
    b = net()
    before = {id(p) for p in b.parameters()}
    on.spectral_norm_(b)
    assert {id(p) for p in b.parameters()} == before
    optimizer = torch.optim.SGD(b.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        b(inputs()).square().sum().backward()
        optimizer.step()
    assert b(inputs()).isfinite().all()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("inner", [False, True])
def test_under_ddp_and_fsdp(inner: bool) -> None:
    """Same outputs and gradients; with inner layers sharded on their own; in mixed precision."""
    from torch.distributed import fsdp

    _, b = twins()
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(b))
    sharded, half = copy.deepcopy(b), copy.deepcopy(b)
    mesh = dist.init_device_mesh("cpu", (1,))
    bf16 = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for m, options in ((sharded, {}), (half, {"mp_policy": bf16})):
        if inner:
            fsdp.fully_shard(m[4], mesh=mesh, **options)
        fsdp.fully_shard(m, mesh=mesh, **options)
    want = b(inputs())
    want.square().sum().backward()
    for m in (ddp, sharded):
        got = m(inputs())
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        got.square().sum().backward()
        for p, q in zip(m.parameters(), b.parameters(), strict=True):
            grad = p.grad.full_tensor() if m is sharded else p.grad
            torch.testing.assert_close(grad, q.grad, rtol=1e-10, atol=1e-12)
    low = half(inputs())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), want, rtol=0.1, atol=0.1)
    low.sum().backward()
    assert all(x.dtype == torch.float64 for x in half.buffers())


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("together", [False, True])
def test_zero_and_nan_weights(together: bool) -> None:
    m = nn.Sequential(nn.Linear(6, 5))
    on.spectral_norm_(m) if together else on.spectral_norm(m[0])
    with torch.no_grad():
        original(m[0]).zero_()
    y = m(torch.randn(3, 6))
    y.sum().backward()
    assert not m[0].weight.any() and original(m[0]).grad.any()
    vectors = [x.clone() for x in m.buffers()]
    assert all(abs(x.norm() - 1) <= 1e-6 for x in vectors)
    with torch.no_grad():
        original(m[0])[0, 0] = math.nan
    assert m(torch.randn(3, 6)).isnan().any()
    assert all(torch.equal(x, y) for x, y in zip(vectors, m.buffers(), strict=True))


@pytest.mark.parametrize("first", ["ours", "u_first", "v_first", "group"])
def test_double_registration(first: str) -> None:
    m = nn.Sequential(nn.Linear(3, 4))
    wrap = {"ours": on.spectral_norm, "group": None}.get(first, first)
    if first == "group":
        on.spectral_norm_(m)
    else:
        (wrap if callable(wrap) else theirs(first))(m[0])
    keys = list(m.state_dict())
    for again in (lambda: on.spectral_norm(m[0]), lambda: on.spectral_norm_(m)):
        with pytest.raises(ValueError, match="spectral norm already"):
            again()
    with pytest.raises(ValueError, match="spectral norm already"):
        on.sigma_reparam(m[0])
    assert list(m.state_dict()) == keys


def test_bad_arguments_change_nothing() -> None:
    m = nn.Linear(3, 4)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "n_power_iterations must be at least 1", {"n_power_iterations": 0}),
        (TypeError, "n_power_iterations must be an integer", {"n_power_iterations": 1.5}),
        (ValueError, "eps must be in", {"eps": -1.0}),
        (ValueError, "order must be one of", {"order": "both"}),
        (ValueError, r"dim must be in \[-2, 1\], got 2", {"dim": 2}),
        (ValueError, "no parameter or buffer 'gain'", {"name": "gain"}),
        (TypeError, "must be a convolution, got Linear", {"size": (8,)}),
    ]
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            on.spectral_norm(m, **options)
        assert list(m.state_dict()) == ["weight", "bias"]
    with pytest.raises(ValueError, match="must be initialized"):
        on.spectral_norm(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="no parameter or buffer"):
        on.spectral_norm(nn.ReLU())
    integers = nn.Module()
    integers.register_buffer("weight", torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match="float32"):
        on.spectral_norm(integers)


def test_relatives_refuse_before_anything_is_changed() -> None:
    m = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        m[1].weight[0, 0] = math.nan
    for f in (on.sigma_reparam_, lambda m: on.sigma_reparam(m[1])):
        with pytest.raises(ValueError, match="weight must be finite"):
            f(m)
        assert sorted(m.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    on.spectral_rescale(m[0])
    with pytest.raises(ValueError, match="rescaled already"):
        on.spectral_rescale(m[0])


def test_changed_shapes_are_refused() -> None:
    m = on.spectral_norm(nn.Linear(3, 4))
    with torch.no_grad():
        original(m).set_(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"must keep shape \(4, 3\), got \(5, 3\)"):
        m(torch.randn(2, 3))


def test_further_parametrizations_act_on_the_result() -> None:
    class Double(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return 2 * W

    _, b = twins()
    c = copy.deepcopy(b)
    parametrize.register_parametrization(c[6], "weight", Double())
    c.load_state_dict(b.state_dict())
    with torch.no_grad():
        want, got = b(inputs()) - b[6].bias, c(inputs()) - c[6].bias
    torch.testing.assert_close(got, 2 * want, rtol=1e-11, atol=1e-12)
