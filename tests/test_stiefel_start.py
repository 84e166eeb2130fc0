"""StiefelAdam's first step: orthonormal from full rank, and a refusal of singular matrices."""

from __future__ import annotations

import pytest
import torch
from orthonorm import optim
from torch import nn

SINGULAR = {
    "zeros": lambda: torch.zeros(8, 4),
    "ones": lambda: torch.ones(8, 4),
    "square": lambda: torch.diag(torch.tensor([1.0, 2.0, 0.0])),
    "wide": lambda: torch.ones(3, 7),
    "one of a batch": lambda: torch.stack([torch.eye(4, 3), torch.zeros(4, 3)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", SINGULAR)
def test_singular_matrices_are_refused_before_anything_is_written(
    kind: str, dtype: torch.dtype
) -> None:
    good = nn.Parameter(torch.randn(8, 4).to(dtype))
    bad = nn.Parameter(SINGULAR[kind]().to(dtype))
    before = [p.detach().clone() for p in (good, bad)]
    opt = optim.StiefelAdam([("fine", good), ("lora_B", bad)])
    for p in (good, bad):
        p.grad = torch.randn(p.shape).to(dtype)
    with pytest.raises(ValueError, match=r"full rank at their first step.*'lora_B'"):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip((good, bad), before, strict=True))
    assert not opt.state[good] and not opt.state[bad]
    bad.data.copy_(nn.init.orthogonal_(torch.empty(bad.shape)))
    opt.step()
    assert all(p.isfinite().all() for p in (good, bad))


@pytest.mark.parametrize("shape", [(8, 4), (3, 7), (5, 5), (2, 6, 3)])
def test_the_first_step_makes_matrices_orthonormal(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    opt = optim.StiefelAdam([p])
    p.grad = torch.randn_like(p)
    opt.step()
    sigma = torch.linalg.svdvals(p.detach())
    torch.testing.assert_close(sigma, torch.ones_like(sigma))


def test_a_compiled_step_does_not_look() -> None:
    """It breaks no graph: what is singular becomes NaN, and nothing else does."""
    good, bad = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.zeros(6, 3))
    opt = optim.StiefelAdam([good, bad])
    for p in (good, bad):
        p.grad = torch.randn(6, 3)
    torch._dynamo.reset()
    torch.compile(opt.step, backend="eager", fullgraph=True)()
    assert good.isfinite().all() and bad.isnan().all()
