"""Every way to normalize layers: used twice before a backward, compiled, sharded, averaged, and
with zero and NaN weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from orthonorm import nn as on
from torch import Tensor, nn
from torch.distributed import fsdp


def each(register: Callable[..., nn.Module]) -> Callable[[nn.Module], object]:
    return lambda m: [register(m[0]), register(m[2])]


def by_operator(m: nn.Module) -> None:
    on.spectral_norm(m[0], size=(6, 6))


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "spectral_norm": each(on.spectral_norm), "spectral_norm_": on.spectral_norm_,
    "by operator": by_operator,
    "sigma_reparam": each(on.sigma_reparam), "sigma_reparam_": on.sigma_reparam_,
    "stable_rank_norm": each(on.stable_rank_norm), "stable_rank_norm_": on.stable_rank_norm_,
    "spectral_rescale": each(on.spectral_rescale),
}  # fmt: skip
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
# the others share their code with these, or are compiled in test_nn_registration.py
COMPILED = ("by operator", "sigma_reparam_", "stable_rank_norm_", "spectral_rescale")
VECTORS = pytest.mark.parametrize("way", [*WAYS.values()][:-1], ids=[*WAYS][:-1])


def made(way: Callable[[nn.Module], object]) -> nn.Sequential:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(108, 4)).double()
    way(m)
    return m


def x(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 6, 6, generator=g, dtype=torch.float64)


def same_gradients(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        grad = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
        torch.testing.assert_close(grad, p.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["spectral_norm", "sigma_reparam", "stable_rank_norm"])
@pytest.mark.parametrize("together", ["", "_"])
def test_messages_name_the_function_that_was_called(name: str, together: str) -> None:
    f, m = getattr(on, name + together), nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"^{name}{together}: n_power_iterations must be"):
        f(m if together else m[0], n_power_iterations=0)
    f(m if together else m[0])
    with pytest.raises(ValueError, match=f"^{name}{together}: 'weight' of ParametrizedLinear has"):
        f(m if together else m[0])
    if together:
        with pytest.raises(ValueError, match=f"^{name}_: ReLU has no layers"):
            f(nn.ReLU())
        with pytest.raises(ValueError, match=f"^{name}_: layers must be in the model"):
            f(m, layers=[nn.Linear(2, 2)])
    if name != "spectral_norm":
        norm, rule = nn.LayerNorm(3), {"gamma": ""} if name == "sigma_reparam" else {"target": 0}
        layers = {"layers": [norm]} if together else {}
        with pytest.raises(ValueError, match=f"^{name}{together}: weight must have at least 2"):
            f(norm, **layers)
        with pytest.raises(ValueError, match=f"^{name}{together}: (gamma|target) must be"):
            f(norm, **layers, **rule)


@EACH_WAY
def test_two_forwards_before_the_backward(way: Callable[[nn.Module], object]) -> None:
    """The graph of the first is that of its own vectors, whatever the second did to them."""
    a, b = made(way), made(way)
    b.load_state_dict(a.state_dict())
    a(x()).square().sum().backward()
    a(x(1)).sum().backward()
    (b(x()).square().sum() + b(x(1)).sum()).backward()
    same_gradients(a, b)
    for p, q in zip(a.buffers(), b.buffers(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_eager(name: str) -> None:
    a = made(WAYS[name])
    b = copy.deepcopy(a)
    compiled = torch.compile(b, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        want, got = a(x()), compiled(x())
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        want.sum().backward(), got.sum().backward()
    same_gradients(a, b)
    for p, q in zip(a.buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-11, atol=1e-12)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@EACH_WAY
@pytest.mark.usefixtures("process_group")
def test_under_ddp_and_fsdp(way: Callable[[nn.Module], object]) -> None:
    """DDP, FSDP2, and FSDP2 in mixed precision, whose parameters are halves in the forward."""
    plain = made(way)
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    sharded, half = copy.deepcopy(plain), copy.deepcopy(plain)
    mesh = dist.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(sharded, mesh=mesh)
    fsdp.fully_shard(half, mesh=mesh, mp_policy=fsdp.MixedPrecisionPolicy(torch.bfloat16))
    want = plain(x())
    want.square().sum().backward()
    for m in (ddp, sharded):
        got = m(x())
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        got.square().sum().backward()
        same_gradients(plain, m)
    low = half(x())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), want, rtol=0.1, atol=0.1)
    low.sum().backward()
    assert all(p.grad.full_tensor().isfinite().all() for p in half.parameters())
    assert all(b.dtype == torch.float64 for b in half.buffers())


@VECTORS
def test_average_of_weights(way: Callable[[nn.Module], object]) -> None:
    """An EMA copy with vectors refreshed is one that took as many power steps of its own."""
    m = made(way)
    ema = torch.optim.swa_utils.AveragedModel(
        m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    for seed in range(2):
        with torch.no_grad():
            for p in m.parameters():
                p.add_(torch.randn_like(p))
        m(x(seed))
        ema.update_parameters(m)
    again = copy.deepcopy(ema.module)
    on.refresh_vectors_(ema.module, 20)
    for _ in range(20):
        again[0].weight, again[2].weight
    got, want = ema.module.eval()(x()), again.eval()(x())
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for p, q in zip(ema.module.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@EACH_WAY
def test_zero_and_nan_weights(way: Callable[[nn.Module], object]) -> None:
    """A zero weight stays zero with a gradient; NaN gives NaN and leaves the vectors alone."""
    m = made(way)
    with torch.no_grad():
        for layer in (m[0], m[2]):
            original(layer).zero_()
    m(x()).sum().backward()
    assert not m[0].weight.any() and all(p.grad.isfinite().all() for p in m.parameters())
    vectors = [b.clone() for b in m.buffers()]
    with torch.no_grad():
        original(m[0])[0, 0] = math.nan
    assert m(x()).isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(vectors, m.buffers(), strict=True))


def original(layer: nn.Module) -> Tensor:
    found = getattr(layer, "parametrizations", None)
    return layer.weight if found is None else found.weight.original
