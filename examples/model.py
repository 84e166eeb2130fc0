"""A LLaMA-style decoder: RMSNorm, rotary positions, causal attention, SwiGLU.

Module names contain "attn" and "mlp", so that an optimizer can tell the hidden matrices from the
embedding, the head and the gains by name, as `hidden_matrices` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a `Llama`; `intermediate` is the width of the SwiGLU, 2.7 x hidden in LLaMA.

    `init_std` is the standard deviation of the initial matrices, 0.02 in LLaMA. 0 stands for
    1 / sqrt(columns), divided by sqrt(2 layers) in the last matrix of each residual branch.
    """

    vocab: int
    hidden: int
    intermediate: int
    heads: int
    layers: int
    tied: bool = False
    init_std: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "intermediate", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"model: {name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                "model: hidden must be a multiple of 2 x heads (rotary positions turn pairs), "
                f"got hidden={self.hidden}, heads={self.heads}"
            )


def rotary_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position x 10000^(-2i/head_dim): (length, head_dim/2), float32."""
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), inverse)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + head_dim/2}) by its angle; x is (..., length, head_dim)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions; four square projections, no biases."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q = rotate(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.attn = Attention(shape.hidden, shape.heads)
        self.norm2 = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.mlp = Mlp(shape.hidden, shape.intermediate)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        x = x + self.mlp(self.norm2(x))
        return x


class Llama(nn.Module):
    """The decoder: tokens (batch, length) to logits (batch, length, vocab).

    With `tied` the head is the embedding. Small widths need the larger initial matrices of
    `init_std` 0: at hidden 192 AdamW reached a loss of 2.30 from these in 120 steps, and 2.74 from
    0.02 (2026-11-23).
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.hidden // shape.heads
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = (parameter.shape[1] * (2 * shape.layers if adds else 1)) ** -0.5
                nn.init.normal_(parameter, std=shape.init_std or std)
        if shape.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rotary_table(tokens.shape[1], self.head_dim, tokens.device)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the 2-D weights of modules named "attn" or "mlp", the matrices of Muon and Conda."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and ("attn" in name or "mlp" in name)
    }
