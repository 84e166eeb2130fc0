"""Shapes of the matrices of real models, computed from their architectures.

Weights are (out, in). The experts of a layer are one stack. Convolutions are flattened to
(out, in * height * width). Embeddings, heads, gains and biases belong to AdamW and are left out.
"""

from __future__ import annotations

from typing import NamedTuple

Shape = tuple[int, ...]


class Decoder(NamedTuple):
    """A LLaMA-style decoder: its widths and layers.

    `keys` is the width of keys and values if heads share them, `queries` that of the queries; None
    is the hidden width.
    """

    hidden: int
    inner: int
    layers: int
    keys: int | None = None
    queries: int | None = None

    def attention(self) -> tuple[Shape, ...]:
        keys, queries = self.keys or self.hidden, self.queries or self.hidden
        h = self.hidden
        return ((queries, h), (keys, h), (keys, h), (h, queries))

    def mlp(self, experts: int | None = None) -> tuple[Shape, ...]:
        """Return the shapes of gate, up and down; with experts each is a stack."""
        up, down = (self.inner, self.hidden), (self.hidden, self.inner)
        return (up, up, down) if experts is None else tuple((experts, *s) for s in (up, up, down))

    def shapes(self, experts: int | None = None) -> tuple[Shape, ...]:
        return (*self.attention(), *self.mlp(experts)) * self.layers


# hidden, inner, layers: the sizes of GaLore's recipe (arXiv:2403.03507)
LLAMA = {
    "llama-60m": Decoder(512, 1376, 8),
    "llama-130m": Decoder(768, 2048, 12),
    "llama-350m": Decoder(1024, 2736, 24),
    "llama-1b": Decoder(2048, 5461, 24),
    "llama-7b": Decoder(4096, 11008, 32),
    "llama3-8b": Decoder(4096, 14336, 32, keys=1024),  # arXiv:2407.21783, table 3
    "llama-3m": Decoder(256, 688, 4),  # the size `make demo` trains
}
QWEN3_30B_A3B = Decoder(2048, 768, 48, keys=512, queries=4096)  # 128 experts, arXiv:2505.09388
DEEPSEEK_V3 = Decoder(7168, 2048, 61)  # 256 experts, arXiv:2412.19437; Kimi K2: same, 384 experts


def _gpt2(width: int, layers: int) -> tuple[Shape, ...]:
    """Return fused QKV, projection and an MLP of four times the width: GPT-2, and also ViT."""
    return ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)) * layers


def _resnet50() -> tuple[Shape, ...]:
    """Return the stem, then 3, 4, 6 and 3 bottlenecks of 1x1, 3x3, 1x1.

    Source: arXiv:1512.03385, table 1.
    """
    shapes: list[Shape] = [(64, 3 * 7 * 7)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            if block == 0:
                shapes.append((4 * width, channels))  # the shortcut's projection
            shapes += [(width, channels), (width, width * 9), (4 * width, width)]
            channels = 4 * width
    return tuple(shapes)


def _rl_net() -> tuple[Shape, ...]:
    """Return 126 small matrices: 14 actor-critic pairs (24 inputs, 8 actions) of 9 matrices."""
    actor = ((64, 24), (64, 64), (64, 64), (8, 64))
    critic = ((64, 24), (64, 64), (64, 64), (32, 64), (1, 32))
    return (*actor, *critic) * 14


SHAPES: dict[str, tuple[Shape, ...]] = {
    "gpt2-small": _gpt2(768, 12),  # 48 matrices, 85 M parameters
    "gpt2-small-3": _gpt2(768, 3),  # its first 3 layers, 21 M
    "gpt2-medium": _gpt2(1024, 24),
    **{name: decoder.shapes() for name, decoder in LLAMA.items()},
    "qwen3-30b-a3b": QWEN3_30B_A3B.shapes(128),  # 30 G parameters: for `cluster`
    "qwen3-experts": QWEN3_30B_A3B.mlp(128),  # experts of one layer
    "deepseek-experts": DEEPSEEK_V3.mlp(8),  # experts of one layer, on one device of 32
    "vit-b": ((768, 3 * 16 * 16), *_gpt2(768, 12)),  # arXiv:2010.11929, table 1
    "resnet50": _resnet50(),
    "rl-net": _rl_net(),
}
