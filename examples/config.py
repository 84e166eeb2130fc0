"""Configuration of a training comparison: sizes, schedule, text, presets, and their checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from orthonorm.examples.model import ModelShape


class UsageError(ValueError):
    """A request of the user cannot be done; the text says why in a sentence."""


def option(default: Any, help: str) -> Any:
    """Return a dataclass field that is also a command-line option, with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """All settings of a run, except those of the optimizer, as plain JSON values.

    Every field is a command-line option of the same name; a preset is a set of values for them.
    """

    data: str = option("", "file or folder of text; without it, this Python's own library")
    corpus_bytes: int = option(8_000_000, "read at most this many bytes of text; 0: all of it")
    vocab: int = option(256, "256: bytes; more: a byte-pair encoding trained on the text")
    hidden: int = option(192, "width of the model")
    intermediate: int = option(512, "width of the SwiGLU")
    heads: int = option(4, "attention heads")
    layers: int = option(4, "transformer blocks")
    tied: bool = option(False, "share the embedding with the head")
    init_std: float = option(0.0, "deviation of the initial matrices; 0: 1/sqrt(their columns)")
    context: int = option(128, "tokens in a window")
    batch: int = option(8, "windows in a step")
    micro_batch: int = option(0, "windows in one forward pass (less memory); 0: the whole batch")
    steps: int = option(500, "optimizer steps")
    warmup: int = option(50, "steps of linear warm-up before the cosine")
    min_lr_ratio: float = option(0.1, "last learning rate as a share of the largest")
    clip: float = option(0.0, "clip the gradient's global norm to this; 0: do not clip")
    bf16: bool = option(False, "forward and backward in bfloat16 autocast, fp32 weights")
    seed: int = option(0, "seed of the initial weights and of the data order")
    eval_every: int = option(25, "steps between evaluations; each also writes a checkpoint")
    eval_windows: int = option(64, "windows of validation text in one evaluation")
    device: str = option("cpu", "torch device; only the CPU is tested")
    threads: int = option(0, "CPU threads; 0: as many as torch chooses")
    parallel: str = option("", "under torchrun: ddp, fsdp2 or hsdp (2 replicas, each sharded)")

    def __post_init__(self) -> None:
        for name in ("context", "batch", "steps", "eval_every", "eval_windows"):
            self._require(getattr(self, name) >= 1, name, "must be at least 1")
        not_negative = "corpus_bytes init_std warmup clip seed micro_batch threads"
        for name in not_negative.split():
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        self._require(self.vocab >= 256, "vocab", "must be at least 256, the number of bytes")
        self._require(self.warmup < self.steps, "warmup", f"must be below steps={self.steps}")
        self._require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "must be between 0 and 1")
        kinds = ("", "ddp", "fsdp2", "hsdp")
        self._require(self.parallel in kinds, "parallel", f"must be one of {kinds[1:]}")
        try:
            self.shape()
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {rule}, got {getattr(self, name)}")

    def shape(self) -> ModelShape:
        """Return the model's sizes."""
        names = [field.name for field in dataclasses.fields(ModelShape)]
        return ModelShape(**{name: getattr(self, name) for name in names})


def _llama(hidden: int, intermediate: int, heads: int, layers: int, steps: int) -> dict[str, Any]:
    """Return one size of the Conda paper's LLaMA runs on C4: 512 windows of 256 tokens per step.

    Sizes and schedule: github.com/jie040109/Conda, examples/llama/scripts (449af713). There the
    weights are bf16 and the tokenizer is t5-base. Here the weights stay fp32 under bf16 autocast
    and the tokenizer is trained on `--data`, so losses cannot be compared with the paper's.
    """
    return {
        "hidden": hidden, "intermediate": intermediate, "heads": heads, "layers": layers,
        "corpus_bytes": 0, "vocab": 32_000, "init_std": 0.02, "context": 256, "batch": 512,
        "micro_batch": 128, "steps": steps, "warmup": steps // 10, "eval_every": steps // 100,
        "eval_windows": 2048, "bf16": True, "device": "cuda",
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "smoke": {
        "corpus_bytes": 300_000, "hidden": 32, "intermediate": 64, "heads": 2, "layers": 2,
        "context": 64, "batch": 8, "steps": 40, "warmup": 4, "eval_every": 10, "eval_windows": 32,
        "threads": 1,
    },
    "60m": _llama(512, 1376, 8, 8, 10_000),
    "130m": _llama(768, 2048, 12, 12, 20_000),
    "350m": _llama(1024, 2736, 16, 24, 60_000),
    "1b": _llama(2048, 5461, 32, 24, 100_000),
}  # fmt: skip
PAPER_PRESETS = ("60m", "130m", "350m", "1b")


def make_config(preset: str, given: dict[str, Any]) -> Config:
    """Return the Config of a preset, with its values overridden by `given`."""
    values = {**PRESETS[preset], **given}
    if preset in PAPER_PRESETS and not values.get("data"):
        raise UsageError(
            f"--preset {preset} needs --data: it reads "
            f"{values['steps'] * values['batch'] * values['context'] / 1e9:.1f} billion tokens, "
            "far more than the Python library's text"
        )
    return Config(**values)
