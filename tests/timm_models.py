"""The program of test_frameworks.test_timm: models of timm as it is installed.

A torchvision that was built for another torch has lost its ops, and declares two of them at import;
no model here uses them.
"""

from __future__ import annotations

import inspect
import types

import torch

try:
    import torchvision
except RuntimeError:
    for op in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{op}", schema)
    import torchvision  # noqa: F401

import timm
import timm.optim
from orthonorm.compat.timm import create_optimizer_v2

# what AdamW takes beside vectors and depthwise kernels
OUTSIDE = {
    "vit_tiny_patch16_224": {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"},
    "resnet10t": {"fc.weight"},
    "convnext_atto": {"head.fc.weight"},
}


def signature() -> None:
    theirs = inspect.signature(timm.optim.create_optimizer_v2).parameters
    ours = inspect.signature(create_optimizer_v2).parameters
    assert list(theirs) == list(ours)
    assert {n: p.default for n, p in theirs.items() if n != "opt"} == {
        n: p.default for n, p in ours.items() if n != "opt"
    }


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    more = dict(img_size=32, patch_size=8, depth=2) if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=10, **more)


def trains(name: str) -> None:
    """Every parameter moves, and the loss falls, by an optimizer made of a config of timm's."""
    model = model_of(name)
    config = types.SimpleNamespace(
        opt="muon", lr=0.02, weight_decay=0.1, momentum=0.95, opt_betas=(0.9, 0.99), opt_eps=1e-6
    )
    optimizer = create_optimizer_v2(model, **timm.optim.optimizer_kwargs(config))
    matrices = [g for g in optimizer.param_groups if g["rule"] == "matrix"]
    rest = [g for g in optimizer.param_groups if g["rule"] == "adamw"]
    assert {(g["lr"], g["momentum"], g["weight_decay"]) for g in matrices} == {(0.02, 0.95, 0.1)}
    assert all(g["betas"] == (0.9, 0.99) and g["eps"] == 1e-6 for g in rest)
    names = {
        n for g in rest for n, p in zip(g["param_names"], g["params"], strict=True) if p.dim() > 1
    }
    depthwise = {n for n in names if n.endswith("conv_dw.weight")}
    assert names - depthwise == OUTSIDE[name] and bool(depthwise) == ("convnext" in name), names
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses
    still = [n for n, p in model.named_parameters() if p.grad is not None and p.equal(before[n])]
    assert not still, still


if __name__ == "__main__":
    signature()
    for name in OUTSIDE:
        trains(name)
