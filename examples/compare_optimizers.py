"""Train one small LLaMA with every optimizer under the same tuning budget, and compare them.

    python -m orthonorm.examples.compare_optimizers                  # all of them, minutes on a CPU
    python -m orthonorm.examples.compare_optimizers --preset smoke   # seconds, to see it work
    python -m orthonorm.examples.compare_optimizers --optimizers Muon NorMuon AdamW --out runs/three

The budget is the same for all and is fixed in advance. The learning rate of the matrices starts at
the class's default and moves towards the lower loss (`next_rate`), in a set number of runs on a
seed that serves nothing else. The best rate then trains on every seed of the comparison. All other
settings are the class's defaults, except for SETTINGS. AdamW comes first, because embeddings, head
and gains have this AdamW at its best rate in all runs.

Each optimizer's results are written to the output folder as soon as they are complete; a second
call continues after them. At the end come optimizers.json, optimizers.md and optimizers.png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import inspect
import io
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from orthonorm.bench.environment import processor
from orthonorm.examples.comparison import BASELINE, plot, table
from orthonorm.examples.config import Config, UsageError
from orthonorm.examples.data import load_corpus
from orthonorm.examples.model import Llama
from orthonorm.examples.optimizers import Settings
from orthonorm.examples.progress import write_whole
from orthonorm.examples.report import Finished
from orthonorm.examples.training import Run, Trainer
from orthonorm.optim import REGISTRY

FORMAT = "orthonorm-optimizers-1"
TUNING_SEED = 1000
FACTOR = 3.0  # ratio of successive learning rates, until the best lies between two others

# Settings that differ from the class's defaults, which do not fit runs of a hundred steps. AdamW
# and Conda are as in tuned.json. Scion averages gradients as in its authors' language models; its
# default does not average.
SETTINGS: dict[str, Settings] = {
    "AdamW": {"betas": [0.9, 0.95], "weight_decay": 0.1},
    "Conda": {"betas": [0.9, 0.99], "update_proj_gap": 50},
    "Scion": {"momentum": 0.1},
}


@dataclass(frozen=True)
class Plan:
    """The model, and the budget of every optimizer."""

    config: Config
    rates: int  # number of runs that search the learning rate
    seeds: tuple[int, ...]  # seeds of the runs that are compared


PRESETS: dict[str, Plan] = {
    "small": Plan(
        Config(
            corpus_bytes=4_000_000, hidden=96, intermediate=256, heads=4, layers=3, context=64,
            batch=8, steps=120, warmup=12, eval_every=12, eval_windows=64,
        ),
        rates=5, seeds=(0, 1, 2),
    ),
    "smoke": Plan(
        Config(
            corpus_bytes=200_000, hidden=32, intermediate=64, heads=2, layers=1, context=32,
            batch=4, steps=8, warmup=2, eval_every=4, eval_windows=8, threads=1,
        ),
        rates=3, seeds=(0, 1),
    ),
}  # fmt: skip

Measure = Callable[[float], float]  # learning rate to final validation loss; inf if it diverged


def next_rate(seen: dict[float, float]) -> float:
    """Return the learning rate to try after those in {rate: loss}.

    If the best rate is at an end, it is FACTOR beyond it. Otherwise it is the geometric mean of the
    best rate and the better of its neighbours.
    """
    rates = sorted(seen)
    at = min(range(len(rates)), key=lambda i: (seen[rates[i]], i))
    if at == len(rates) - 1 and len(rates) > 1:
        return rates[at] * FACTOR
    if at == 0:
        return rates[0] / FACTOR if len(rates) > 1 else rates[0] * FACTOR
    neighbour = min(rates[at - 1], rates[at + 1], key=lambda rate: seen[rate])
    return math.sqrt(rates[at] * neighbour)


def search(start: float, budget: int, measure: Measure) -> dict[float, float]:
    """Return {rate: loss} of `budget` learning rates, chosen by `next_rate` from `start`."""
    seen = {start: measure(start)}
    while len(seen) < budget:
        rate = next_rate(seen)
        seen[rate] = measure(rate)
    return seen


def settings_of(name: str, adamw: Settings) -> tuple[float, Settings]:
    """Return the first learning rate and the settings that are not tuned.

    `adamw` has the settings for parameters that are no matrices.
    """
    settings = dict(SETTINGS.get(name, {}))
    start: float = inspect.signature(REGISTRY[name]).parameters["lr"].default
    return start, settings if name == BASELINE else {**settings, "adamw": adamw}


class ShortTrainer(Trainer):
    """A Trainer without checkpoints, because a run of seconds can start again."""

    def save(self) -> None:
        pass


def train(config: Config, name: str, settings: Settings, folder: Path) -> Finished:
    """Train in this process without output; the run's files are deleted."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        trainer = ShortTrainer(Run(config, name, settings), Path(made), folder / "tokens.pt")
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.resume()  # to start the log
            trainer.train()
        return Finished.read(Path(made))


def final_loss(run: Finished) -> float:
    """Return the validation loss of a run; inf if it diverged."""
    return math.inf if run.result["diverged"] else run.result["val_loss"]


def compare(plan: Plan, name: str, adamw: Settings, folder: Path) -> dict[str, Any]:
    """Spend the budget of one optimizer; return the rates it tried and the runs of the best one."""
    start, settings = settings_of(name, adamw)
    tuning = dataclasses.replace(plan.config, seed=TUNING_SEED, eval_every=plan.config.steps)
    began = time.perf_counter()
    seen = search(
        start,
        plan.rates,
        lambda rate: final_loss(train(tuning, name, {**settings, "lr": rate}, folder)),
    )
    best = min(seen, key=lambda rate: seen[rate])
    runs = []
    for seed in plan.seeds:
        config = dataclasses.replace(plan.config, seed=seed)
        run = train(config, name, {**settings, "lr": best}, folder)
        keys = ("val_loss", "diverged", "seconds", "optimizer_seconds", "state_bytes")
        curve = [[row[key] for key in ("step", "seconds", "val_loss")] for row in run.rows]
        runs.append({"seed": seed, **{k: run.result[k] for k in keys}, "curve": curve})
    return {
        "optimizer": name,
        "settings": {**settings, "lr": best},
        "rates": [
            {"lr": rate, "val_loss": loss if math.isfinite(loss) else None}
            for rate, loss in sorted(seen.items())
        ],
        "runs": runs,
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


def how(plan: Plan, argv: Sequence[str], source: str) -> dict[str, Any]:
    """Return a description of the comparison and of its machine, for the JSON file."""
    return {
        "command": shlex.join(["python", "-m", "orthonorm.examples.compare_optimizers", *argv]),
        "date": datetime.date.today().isoformat(),
        "text": source,
        "config": dataclasses.asdict(plan.config),
        "rates": f"{plan.rates} runs on seed {TUNING_SEED}, from the default by factors of "
        f"{FACTOR:g}, then between the best and its better neighbour",
        "seeds": list(plan.seeds),
        "parameters": sum(p.numel() for p in Llama(plan.config.shape()).parameters()),
        "torch": torch.__version__,
        "device": processor(),
        "threads": plan.config.threads or torch.get_num_threads(),
    }


def stored(path: Path, how: dict[str, Any]) -> dict[str, Any] | None:
    """Return the stored results of an optimizer, or None; raise UsageError if the plan differs."""
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    for key in ("config", "rates", "seeds", "text"):
        if saved["how"][key] != how[key]:
            raise UsageError(f"{path} must be of the same {key} as this comparison: "
                             "name another --out")  # fmt: skip
    result: dict[str, Any] = saved["result"]
    return result


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orthonorm.examples.compare_optimizers", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="model and budget (default: small)")
    add("--optimizers", nargs="+", choices=REGISTRY, metavar="NAME", default=list(REGISTRY),
        help=f"of {', '.join(REGISTRY)} (default: all)")  # fmt: skip
    add("--out", type=Path, help="output folder (default: runs/optimizers-PRESET)")
    add("--json", type=Path, help="the results (default: OUT/optimizers.json)")
    add("--plot", type=Path, help="the curves (default: OUT/optimizers.png)")
    return parser


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Train every optimizer, AdamW first, and write the results, the table and the curves."""
    plan = PRESETS[args.preset]
    out: Path = args.out or Path(f"runs/optimizers-{args.preset}")
    out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(plan.config)
    tokens = {"train": corpus.train, "val": corpus.val}
    write_whole(out / "tokens.pt", lambda path: torch.save(tokens, path))
    about = how(plan, argv, corpus.source)
    results = []
    adamw: Settings = {}
    for name in dict.fromkeys([BASELINE, *args.optimizers]):
        path = out / f"{name}.json"
        result = stored(path, about)
        if result is None:
            result = compare(plan, name, adamw, out)
            text = json.dumps({"how": about, "result": result}, indent=1) + "\n"
            write_whole(path, lambda part, text=text: part.write_text(text))
        adamw = adamw or result["settings"]
        losses = ", ".join(
            "diverged" if r["diverged"] else f"{r['val_loss']:.4f}" for r in result["runs"]
        )
        print(f"{name:16} lr {result['settings']['lr']:<8.3g} val loss {losses}  "
              f"({result['wall_seconds']:.0f} s)", flush=True)  # fmt: skip
        results.append(result)
    found = {"format": FORMAT, "how": about, "optimizers": results}
    text = to_text(found)
    write_whole(args.json or out / "optimizers.json", lambda part: part.write_text(text))
    words = table(found)
    write_whole(out / "optimizers.md", lambda part: part.write_text(words + "\n"))
    curves: Path = args.plot or out / "optimizers.png"
    print(f"\n{words}\n\n{plot(found, curves) or f'Curves: {curves}'}")


def to_text(found: dict[str, Any]) -> str:
    """Return the results as JSON with a line for each run."""
    rows = []
    for result in found["optimizers"]:
        runs = ",\n".join("    " + json.dumps(r) for r in result["runs"])
        rest = json.dumps({k: v for k, v in result.items() if k != "runs"})
        rows.append(f'  {rest[:-1]}, "runs": [\n{runs}]}}')
    body = ",\n".join(rows)
    about = json.dumps(found["how"])
    return (
        f'{{"format": {json.dumps(found["format"])},\n"how": {about},\n'
        f'"optimizers": [\n{body}\n]}}\n'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0: done, 2: bad request, 130: interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run(make_parser().parse_args(argv), argv)
    except UsageError as error:
        print(f"orthonorm.examples.compare_optimizers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the next optimizer", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
