"""Cases of tests/test_distributed.py: the example's training loop on several ranks."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_registry import Context, case
from orthonorm.examples.config import make_config
from orthonorm.examples.data import load_corpus
from orthonorm.examples.optimizers import default_settings
from orthonorm.examples.training import Run, Trainer

SHORT = dict(steps=6, warmup=1, eval_every=3, eval_windows=20)


def trainer(folder: Path, parallel: str, micro_batch: int) -> Trainer:
    """Rank 0 makes the folder, as it does for the example."""
    config = make_config("smoke", dict(SHORT, parallel=parallel, micro_batch=micro_batch))
    if dist.get_rank() == 0 and not folder.exists():
        corpus = load_corpus(config)
        folder.mkdir()
        torch.save({"train": corpus.train, "val": corpus.val}, folder.parent / "tokens.pt")
    dist.barrier()
    run = Run(config, "muon", default_settings("muon", "smoke"))
    new = Trainer(run, folder, folder.parent / "tokens.pt")
    new.resume()
    return new


def losses(folder: Path) -> list[float]:
    dist.barrier()
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "3", "6"]
    found = [float(row[key]) for row in rows for key in ("train_loss", "val_loss")]
    return found[1:]  # there is no training loss before a step


def spread(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def follow_one_process(context: Context, kind: str) -> None:
    """The losses of one process that adds up a batch in as many parts as there are ranks.

    Two ranks add what it adds; four add in another order, which may change as much as another
    number of parts changes in one process.
    """
    own, alone = 8 // context.world, {}  # windows of a rank; validation is in parts of as many
    for part in (own, 8):
        alone[part] = context.folder / f"alone-{kind}-{part}-{context.rank}"
        alone[part].mkdir()
    trainer(context.folder / kind, kind, own).train()
    found = losses(context.folder / kind)
    for part, folder in alone.items():
        config = make_config("smoke", dict(SHORT, micro_batch=part))
        new = Trainer(Run(config, "muon", default_settings("muon", "smoke")), folder,
                      context.folder / "tokens.pt")  # fmt: skip
        new.resume()
        new.train()
    one, other = (losses(folder) for folder in alone.values())
    allowed = 1e-12 if context.world == 2 else 2 * spread(one, other)
    assert 0 < spread(one, other) < 1e-3
    assert spread(found, one) <= allowed, (found, one, other)


for _kind, _world in (("ddp", 2), ("fsdp2", 2), ("hsdp", 4)):
    case(_world, name=f"training_{_kind}")(
        lambda context, kind=_kind: follow_one_process(context, kind)
    )


@case(2)
def training_resumes_bit_for_bit(context: Context) -> None:
    whole, halves = context.folder / "whole", context.folder / "halves"
    trainer(whole, "fsdp2", 2).train()
    trainer(halves, "fsdp2", 2).train(stop_after=2)
    dist.barrier()
    assert not (halves / "result.json").exists()
    trainer(halves, "fsdp2", 2).train()
    assert losses(halves) == losses(whole)
    first, second = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, halves))
    assert first["model"].keys() == second["model"].keys() and len(first["model"]) == 21
    for name, t in first["model"].items():
        assert torch.equal(t, second["model"][name]), name
