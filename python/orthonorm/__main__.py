"""`python -m orthonorm`: print what is installed and what serves each op, or run a command."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Sequence

import torch

from . import LOADED, OPS, __version__

COMMANDS = {
    "bench": ("orthonorm.bench.__main__", "time ops and optimizer steps against their peers"),
    "convert": (
        "orthonorm.convert",
        "turn another library's optimizer state into one to load here",
    ),
    "train": ("orthonorm.examples.train_lm", "train a small language model on real text"),
}
DEVICES = ("CPU", "CUDA")


def serving(name: str, key: str) -> tuple[str, str]:
    """Return (backend, reason): what serves op `name` on dispatch key `key`, and why."""
    if (name, key) in LOADED.served:
        part = LOADED.parts.get((name, key))
        return LOADED.served[name, key], f"kernel loaded for {part}" if part else "kernel loaded"
    if OPS[name].composite:
        return "composite", "calls other ops, whose kernels serve it"
    library = {"CPU": "_C.so", "CUDA": "_C_cuda.so"}[key]
    if key == "CUDA" and torch.version.cuda is None:
        return "-", "this torch is a CPU build"
    state = LOADED.libraries.get(library, "not built")
    return "reference", "no kernel yet" if state == "loaded" else f"{library} {state}"


def instruction_set() -> str:
    """Return the instruction set that ORTHONORM_ISA (csrc/cpu/isa.h) asks of the CPU kernels."""
    wish = os.environ.get("ORTHONORM_ISA")
    known = "portable", "avx2", "avx512", "avx512bf16", "amx"
    if wish is None or wish in known:
        return wish or "the processor's"
    return f"the processor's: {wish!r} is none of {', '.join(known)}"


def versions() -> list[tuple[str, str]]:
    """Return versions, settings and states of the libraries, as (name, text) rows."""
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = "not installed"
    rows = [
        ("orthonorm", __version__),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", triton),
        ("python", platform.python_version()),
        (
            "platform",
            f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        ),
        ("cpu capability", torch.backends.cpu.get_cpu_capability()),
        ("ORTHONORM_BACKEND", LOADED.backend),
        ("ORTHONORM_ISA", instruction_set()),
    ]
    return rows + [(name, state) for name, state in LOADED.libraries.items()]


def show_config(markdown: bool = False) -> str:
    """Return the text of `python -m orthonorm`: versions, and each op's backends with reasons.

    `markdown` gives a table of ops and backends only.
    """
    ops = [(n, *(f for key in DEVICES for f in serving(n, key))) for n in sorted(OPS)]
    if markdown:
        head = ["| op | CPU | CUDA |", "|---|---|---|"]
        return "\n".join(head + [f"| `{n}` | {cpu} | {cuda} |" for n, cpu, _, cuda, _ in ops])
    lines = [f"{name:18} {text}" for name, text in versions()]
    lines += ["", f"{'op':31} {'CPU':10} {'CUDA':10} why"]
    for name, cpu, why_cpu, cuda, why_cuda in ops:
        why = why_cpu if why_cpu == why_cuda else f"CPU: {why_cpu}; CUDA: {why_cuda}"
        lines.append(f"{name:31} {cpu:10} {cuda:10} {why}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[arguments[0]][0])
        return int(module.main(arguments[1:]) or 0)
    commands = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m orthonorm",
        description="Print what is installed and which backend serves each op, or run a command.",
        epilog=f"commands (each with its own --help):\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=[*COMMANDS], help=argparse.SUPPRESS)
    parser.add_argument("--markdown", action="store_true", help="the op table for a README")
    try:
        print(show_config(parser.parse_args(arguments).markdown), flush=True)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
