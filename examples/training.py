"""One optimizer's run: the training loop, its log, its checkpoint.

    python -m orthonorm.examples.training runs/demo/adamw

trains the run that `run.json` in the folder describes. train_lm.py writes that file and starts this
program once per optimizer, so that peak memory is that of one optimizer. It writes to the folder

    log.csv         one row per evaluation
    checkpoint.pt   everything needed to continue bit for bit; loads with weights_only=True
    result.json     the numbers of the finished run
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from orthonorm.examples.config import Config
from orthonorm.examples.data import TrainBatches, validation_windows
from orthonorm.examples.model import Llama
from orthonorm.examples.optimizers import Settings, build_optimizer
from orthonorm.examples.progress import Progress, write_whole
from orthonorm.examples.ranks import Ranks, join, launched, leave
from torch import Tensor

CSV_COLUMNS = ("step", "tokens", "train_loss", "val_loss", "lr", "seconds", "optimizer_seconds")


@dataclass(frozen=True)
class Run:
    """One optimizer in one comparison: the contents of `run.json`."""

    config: Config
    optimizer: str
    settings: Settings

    @staticmethod
    def read(path: Path) -> Run:
        """Read a run from the file that has its `text`."""
        values = json.loads(path.read_text())
        return Run(Config(**values["config"]), values["optimizer"], values["settings"])

    def text(self) -> str:
        """Return the run as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def cosine(config: Config, step: int) -> float:
    """Return the share of the largest learning rate at `step`: linear warm-up, then a cosine."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    low = config.min_lr_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Trainer:
    """Model, optimizer, schedule, data and progress of one run."""

    def __init__(self, run: Run, folder: Path, tokens: Path) -> None:
        self.run, self.config, self.folder = run, run.config, folder
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.ranks = Ranks.of(config)
        self.device = self.ranks.device(config.device)
        self.model = Llama(config.shape()).to(self.device)
        self.ranks.shard(self.model, self.device)
        settings = dict(run.settings)
        self.optimizer = build_optimizer(run.optimizer, self.model, settings.pop("lr"), **settings)
        self.replicated = self.ranks.replicated(self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine(config, step)
        )
        text = torch.load(tokens, weights_only=True, mmap=True)
        self.batches = TrainBatches(text["train"], config)
        self.validation = validation_windows(text["val"], config).to(self.device)
        self.step = 0
        self.seconds = self.optimizer_seconds = 0.0  # training time, without evaluations
        self.peak_bytes = 0
        self.diverged = False
        self.val_loss = math.nan

    # The loop ---------------------------------------------------------------------------------

    def train(self, stop_after: int | None = None) -> None:
        """Train to the end, or stop at the first evaluation at or after step `stop_after`."""
        config, lead = self.config, self.ranks.rank == 0
        progress = Progress(self.run.optimizer, config.steps, self.step, shown=lead)
        if self.step == 0:
            self.report(progress, train_loss=math.nan, lr=0.0)
        losses: list[float] = []
        while self.step < config.steps and not self.diverged:
            lr = float(self.optimizer.param_groups[0]["lr"])
            with self.timed("seconds"):
                losses.append(self.forward_backward(self.batches[self.step]))
                if config.clip:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
                with self.timed("optimizer_seconds"):
                    self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.step += 1
            self.diverged = not math.isfinite(losses[-1])
            progress.step()
            if self.step % config.eval_every == 0 or self.step == config.steps or self.diverged:
                self.report(progress, sum(losses) / len(losses), lr)
                self.save()
                losses.clear()
                if stop_after is not None and self.step >= stop_after:
                    break
        progress.close()
        if self.step == config.steps or self.diverged:
            self.finish()

    def forward_backward(self, batch: Tensor) -> float:
        """Add the batch's gradient to .grad, micro-batch by micro-batch; return the mean loss."""
        total, windows = 0.0, self.ranks.part(batch).to(self.device)
        pieces = slices(windows, self.config.micro_batch or len(windows))
        for i, piece in enumerate(pieces):
            self.ranks.synchronize(self.replicated, i == len(pieces) - 1)
            loss = self.loss(piece) * (len(piece) / len(windows))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return self.ranks.sum(total, self.device) / self.ranks.size

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy of predicting each next token, in nats per token."""
        with self.autocast():
            logits = self.replicated(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss over the validation windows, which are divided among the ranks.

        All ranks compute equally often, because sharded models require it. Pieces that a rank
        computes only for that reason have weight 0.
        """
        pieces = slices(self.validation, self.config.micro_batch or self.config.batch)
        total = 0.0
        for i in range(self.ranks.rank, -(-len(pieces) // self.ranks.size) * self.ranks.size,
                       self.ranks.size):  # fmt: skip
            piece = pieces[i % len(pieces)]
            total += self.loss(piece).item() * (len(piece) if i < len(pieces) else 0)
        return self.ranks.sum(total, self.device) / len(self.validation)

    # Files ------------------------------------------------------------------------------------

    def report(self, progress: Progress, train_loss: float, lr: float) -> None:
        """Evaluate, append the row to log.csv and print it."""
        self.val_loss = val_loss = self.validation_loss()
        if self.ranks.rank:
            return
        tokens = self.step * self.config.batch * self.config.context
        with (self.folder / "log.csv").open("a", newline="") as file:
            csv.writer(file).writerow(
                [self.step, tokens, repr(train_loss), repr(val_loss), repr(lr),
                 f"{self.seconds:.4f}", f"{self.optimizer_seconds:.4f}"]
            )  # fmt: skip
        shown = f"{train_loss:.4f}" if self.step else "  -   "
        progress.say(
            f"{self.run.optimizer:12} step {self.step:6}/{self.config.steps}  "
            f"train {shown}  val {val_loss:.4f}  {self.seconds:7.1f} s"
        )

    def finish(self) -> None:
        """Write result.json, which marks the run as complete."""
        if self.ranks.rank:
            return
        result = {
            "optimizer": self.run.optimizer,
            "settings": self.run.settings,
            "steps": self.step,
            "diverged": self.diverged or not math.isfinite(self.val_loss),
            "val_loss": self.val_loss if math.isfinite(self.val_loss) else None,
            "seconds": self.seconds,
            "optimizer_seconds": self.optimizer_seconds,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "state_bytes": sum(t.nbytes for t in tensors_in(self.optimizer.state_dict())),
            "peak_bytes": max(self.peak_bytes, peak_bytes(self.device)) or None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        text = json.dumps(result, indent=2) + "\n"
        write_whole(self.folder / "result.json", lambda path: path.write_text(text))

    def save(self) -> None:
        """Write checkpoint.pt, which has only tensors, numbers and strings."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        checkpoint = {
            "step": self.step,  # also the position in the data, as batch i depends on i only
            **self.ranks.state(self.model, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda,
            "val_loss": self.val_loss,
            "diverged": self.diverged,
            "seconds": self.seconds,
            "optimizer_seconds": self.optimizer_seconds,
            "peak_bytes": max(self.peak_bytes, peak_bytes(self.device)),
        }
        if self.ranks.rank == 0:
            write_whole(self.folder / "checkpoint.pt", lambda path: torch.save(checkpoint, path))

    def resume(self) -> None:
        """Continue from checkpoint.pt, or start the log if there is none."""
        path, rows = self.folder / "checkpoint.pt", [",".join(CSV_COLUMNS)]
        if path.exists():
            saved = torch.load(path, weights_only=True, map_location=self.device)
            self.ranks.load(saved, self.model, self.optimizer)
            self.schedule.load_state_dict(saved["schedule"])
            torch.set_rng_state(saved["rng"].cpu())
            if self.device.type == "cuda":
                torch.cuda.set_rng_state_all([state.cpu() for state in saved["cuda_rng"]])
            for name in ("step", "val_loss", "diverged", "seconds", "optimizer_seconds"):
                setattr(self, name, saved[name])
            self.peak_bytes = saved["peak_bytes"]
            written = (self.folder / "log.csv").read_text().splitlines()[1:]
            whole = [row for row in written if row.count(",") == rows[0].count(",")]
            rows += [row for row in whole if int(row.split(",")[0]) <= self.step]
        if self.ranks.rank == 0:
            text = "\n".join(rows) + "\n"
            write_whole(self.folder / "log.csv", lambda part: part.write_text(text))

    # The device -------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of bfloat16 autocast, enabled if the config says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block, device work included, to the attribute `name`."""
        started = self.clock()
        yield
        setattr(self, name, getattr(self, name) + self.clock() - started)

    def clock(self) -> float:
        """Return the time in seconds, after waiting for all work on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def slices(windows: Tensor, size: int) -> list[Tensor]:
    """Cut `windows` into slices of at most `size`."""
    return [windows[i : i + size] for i in range(0, len(windows), size)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far, or 0 if unknown.

    It is that of this process on a CPU, and that of torch's allocator on CUDA. On Linux it reads
    VmHWM, because a child process inherits ru_maxrss from its parent.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024
    except (OSError, StopIteration):
        pass
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Train the run of a folder, from its checkpoint if it has one."""
    parser = argparse.ArgumentParser(
        prog="python -m orthonorm.examples.training", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="folder that holds run.json")
    parser.add_argument("--stop-after", type=int, help="stop at the first evaluation at this step")
    args = parser.parse_args(argv)
    if launched():
        join(args.folder.name)
    try:
        run = Run.read(args.folder / "run.json")
        trainer = Trainer(run, args.folder, args.folder.parent / "tokens.pt")
        trainer.resume()
        trainer.train(args.stop_after)
    except KeyboardInterrupt:
        return 130
    if launched():
        leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
