"""Train the small LLaMA of `compare_optimizers` with Muon's state in every storage type.

    python -m orthonorm.examples.compare_states                  # preset small, a minute
    python -m orthonorm.examples.compare_states --preset smoke --seeds 0   # to see it work

Prints a Markdown table: the loss of every seed, the mean difference from float32 on the same seeds,
the bytes of state, and the seconds of a run. Learning rates are fixed and not tuned for any row.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from orthonorm.examples.compare_optimizers import PRESETS, final_loss, train
from orthonorm.examples.data import load_corpus
from orthonorm.examples.optimizers import Settings

STATES: dict[str, Settings] = {
    "float32": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "bfloat16, stochastic rounding": {"state_dtype": "bfloat16", "stochastic_rounding": True},
    "8 bits": {"state_dtype": "8bit"},
}
RATES: Settings = {"lr": 0.02, "adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(argv)
    config = PRESETS[options.preset].config
    corpus = load_corpus(config)
    print(
        "| state | loss, by seed | less float32's | state, bytes | seconds |\n|---|---|---|---|---|"
    )
    exact: list[float] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        torch.save({"train": corpus.train, "val": corpus.val}, folder / "tokens.pt")
        for name, state in STATES.items():
            plans = (
                dataclasses.replace(config, seed=seed, eval_every=config.steps)
                for seed in options.seeds
            )
            runs = [train(plan, "Muon", {**RATES, **state}, folder) for plan in plans]
            losses = [final_loss(run) for run in runs]
            exact = exact or losses
            apart = fmean(a - b for a, b in zip(losses, exact, strict=True))
            cells = (
                name, ", ".join(f"{loss:.4f}" for loss in losses), f"{apart:+.4f}",
                f"{runs[0].result['state_bytes']:,}",
                f"{fmean(run.result['seconds'] for run in runs):.1f}",
            )  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
