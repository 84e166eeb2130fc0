"""Train a small LLaMA-style model on real text with several optimizers, and compare them.

    python -m orthonorm train                            # AdamW, Muon, Conda; minutes on a CPU
    python -m orthonorm train --preset smoke             # seconds
    python -m orthonorm train --data my_text --steps 1000 --lr muon=0.03 --out runs/mine
    python -m orthonorm train --resume --out runs/mine   # continues bit for bit where it stopped
    python -m orthonorm train --sweep --tuned my.json    # finds learning rates, writes my.json
    torchrun --nproc-per-node 2 -m orthonorm train --parallel fsdp2   # or ddp; hsdp from 4 ranks

Every optimizer starts from the same weights and sees the same batches, in its own process. The
output folder gets table.md, curves.png, tokens.pt and config.json, and for each optimizer a folder
with log.csv, checkpoint.pt and result.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthonorm.examples.config import PRESETS, Config, UsageError
from orthonorm.examples.optimizers import BUILDERS, TUNED, Settings, default_settings
from orthonorm.examples.progress import write_whole
from orthonorm.examples.ranks import launched, leads, meet
from orthonorm.examples.report import plot, table
from orthonorm.examples.sweep import sweep, write_settings
from orthonorm.examples.workspace import RunFailed, Workspace


def make_parser() -> argparse.ArgumentParser:
    """Return the parser: options of the comparison, then one for each field of Config."""
    parser = argparse.ArgumentParser(
        prog="python -m orthonorm train",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="sizes and schedule (default: demo)")
    add("--optimizers", nargs="+", choices=BUILDERS, metavar="NAME",
        help=f"of {', '.join(BUILDERS)} (default: adamw muon conda)")  # fmt: skip
    add("--lr", nargs="+", default=[], metavar="NAME=VALUE",
        help="instead of the tuned rates; muon.adamw=VALUE is that of Muon's AdamW")  # fmt: skip
    add("--out", type=Path, help="output folder (default: runs/PRESET)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue what is in --out, if any")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add("--stop-after", type=int, metavar="STEP", help="stop early; --resume continues")
    add("--sweep", action="store_true", help="search learning rates instead of comparing")
    add("--tuned", type=Path,
        help="settings to read; for --sweep to write (default: OUT/tuned.json)")  # fmt: skip
    sizes = parser.add_argument_group("sizes, schedule and text (defaults: those of the preset)")
    for field in dataclasses.fields(Config):
        kind: dict[str, Any] = {"type": type(field.default)}
        kind["metavar"] = field.name.upper() if kind["type"] is str else "N"
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        flag = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} (demo: {field.default!r})"
        sizes.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    return parser


def parse_rates(values: Sequence[str], names: Sequence[str]) -> dict[str, Settings]:
    """Parse ["muon=0.03", "muon.adamw=0.002"] into {"muon": {"lr": 0.03, "adamw_lr": 0.002}}."""
    rates: dict[str, Settings] = {}
    for text in values:
        key, _, number = text.partition("=")
        name, _, companion = key.partition(".")
        if name not in names or companion not in ("", "adamw"):
            raise UsageError(f"--lr must name one of {', '.join(names)}, got {text}")
        if companion and not name.endswith("muon"):
            raise UsageError(f"--lr NAME.adamw=VALUE exists for Muon only, got {text}")
        try:
            rate = float(number)
        except ValueError:
            raise UsageError(f"--lr must be NAME=NUMBER, got {text}") from None
        if not 0 < rate < float("inf"):
            raise UsageError(f"--lr must be positive and finite, got {text}")
        rates.setdefault(name, {})["adamw_lr" if companion else "lr"] = rate
    return rates


def open_workspace(args: argparse.Namespace) -> Workspace:
    """Create the output folder that the options name, or continue the one that is there."""
    preset = args.preset or "demo"
    out: Path = args.out or Path("runs") / (f"sweep-{preset}" if args.sweep else preset)
    given = {f.name: vars(args)[f.name] for f in dataclasses.fields(Config) if f.name in args}
    if (out / "config.json").exists():
        if args.resume:
            return Workspace.reopen(out, args.preset, given, args.optimizers)
        if not args.overwrite:
            raise UsageError(
                f"{out} already holds a run: --resume continues it, --overwrite replaces it, "
                "--out names another folder"
            )
    names = list(dict.fromkeys(args.optimizers or ["adamw", "muon", "conda"]))
    parse_rates(args.lr, names)
    for name in names:
        default_settings(name, preset, settings_file(args))
    return Workspace.create(out, preset, given, names)


def open_on_ranks(args: argparse.Namespace) -> Workspace:
    """Open the folder on rank 0, then on the others, which wait for it.

    If rank 0 fails it exits, and torchrun ends all ranks.
    """
    store, rank, _ = meet("workspace")
    if rank == 0:
        work = open_workspace(args)
        store.set("folder", str(work.out))
        return work
    return Workspace.reopen(Path(store.get("folder").decode()), None, {}, args.optimizers)


def settings_file(args: argparse.Namespace) -> Path:
    """Return the file of default settings; a sweep may name a file that does not exist yet."""
    named: Path | None = args.tuned
    return TUNED if named is None or (args.sweep and not named.exists()) else named


def compare(work: Workspace, args: argparse.Namespace) -> int:
    """Train every optimizer, then print and write the table and the curves."""
    rates = parse_rates(args.lr, work.names)
    complete: list[str] = []
    failed = False
    for name in work.names:
        started = work.settings_of(name)
        settings = started or default_settings(name, work.preset, settings_file(args))
        try:
            if work.run(name, name, {**settings, **rates.get(name, {})}, args.stop_after):
                complete.append(name)
        except RunFailed as error:
            print(f"orthonorm train: {error}", file=sys.stderr)
            failed = True
    if complete and leads():
        runs = [work.finished(name) for name in complete]
        text = table(runs, work.config.device)
        write_whole(work.out / "table.md", lambda path: path.write_text(text))
        curves = plot(runs, work.out / "curves.png", work.source)
        print(f"\n{text}\n{curves or f'Curves: {work.out}/curves.png'}")
    if len(complete) < len(work.names) and not failed:
        print(f"Stopped early; --resume --out {work.out} continues.")
    return 1 if failed else 0


def search(work: Workspace, args: argparse.Namespace, command: str) -> int:
    """Search the learning rates and write the settings file."""

    def measure(name: str, settings: Settings) -> float | None:
        label = f"{name}-lr{settings['lr']:g}"
        work.run(label, name, settings, None)
        loss: float | None = work.finished(label).result["val_loss"]
        return loss

    base = settings_file(args)
    best, losses = sweep(
        work.names, lambda name: default_settings(name, work.preset, base), measure
    )
    path = args.tuned or work.out / "tuned.json"
    if leads():
        write_settings(path, work.config, command, work.names, work.source, best, losses)
    for rule, points in losses.items():
        for point in points:
            mark = " <- best" if point["lr"] == best[rule]["lr"] else ""
            loss = "diverged" if point["val_loss"] is None else f"{point['val_loss']:.4f}"
            print(f"{rule:8} lr {point['lr']:<8g} val loss {loss}{mark}")
    print(f"Written to {path}; --tuned {path} uses it.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0: done, 1: a run failed, 2: bad request, 130: interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(argv)
    if leads():
        return run(argv, args)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        return run(argv, args)


def run(argv: Sequence[str], args: argparse.Namespace) -> int:
    """Do the work of `main` on this rank, and return its exit code."""
    try:
        work = open_on_ranks(args) if launched() else open_workspace(args)
        print(f"{work.source}; {work.config.steps} steps of {work.config.batch} x "
              f"{work.config.context} tokens; output in {work.out}", flush=True)  # fmt: skip
        if args.sweep:
            return search(work, args, shlex.join(["python", "-m", "orthonorm", "train", *argv]))
        return compare(work, args)
    except UsageError as error:
        print(f"orthonorm train: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"orthonorm train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\northonorm train: interrupted; --resume continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
