"""Generated pages: the index of `bench/results`, the tables of the README, the support matrix.

`python -m orthonorm bench results` writes them from the recorded runs, the case table, the sources
and the registry of optimizers. A test checks that they are up to date.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthonorm.examples import comparison

from . import page, ranks, records, support
from .records import Run

FOLDER = Path(__file__).parent / "results"
INDEX = FOLDER / "index.html"
README = FOLDER.parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- bench results:[^>]*-->\n).*?(<!-- end of bench results -->)", re.S)
RANKS = re.compile(r"(<!-- ranks:[^>]*-->\n).*?(<!-- end of ranks -->)", re.S)
OPTIMIZERS = re.compile(r"(<!-- optimizers:[^>]*-->\n).*?(<!-- end of optimizers -->)", re.S)


def runs(folder: Path = FOLDER) -> dict[str, Run]:
    """Return every run in the folder by file name, newest first; other JSON files are skipped."""
    found = {}
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and str(data.get("format", "")).startswith("orthonorm-bench"):
            found[path.name] = records.load(path)
    newest = sorted(found.items(), key=lambda item: item[1].environment["date"], reverse=True)
    return dict(newest)


def latest(found: dict[str, Run]) -> dict[str, tuple[str, Run]]:
    """Return the run that represents each device: the newest with promises, else the newest."""
    chosen: dict[str, tuple[str, Run]] = {}
    for with_claims in (True, False):
        for name, run in found.items():
            if bool(run.claims) == with_claims:
                chosen.setdefault(run.environment["device"], (name, run))
    return chosen


def index(found: dict[str, Run]) -> str:
    """Return the index page: a table of all runs, and the representative of each device in full."""
    rows = []
    for name, run in found.items():
        e = run.environment
        noisy = sum(r.noisy for r in run.records)
        held = sum(bool(c["held"]) for c in run.claims)
        promises = f"{held} of {len(run.claims)}" if run.claims else ""
        rows.append((name, e["date"][:10], e["device"], str(e["threads"]), e["torch"], e["commit"],
                     str(len(run.records)), str(noisy), promises))  # fmt: skip
    head = (
        "file",
        "date",
        "device",
        "threads",
        "torch",
        "commit",
        "rows",
        "noisy",
        "promises held",
    )
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f'<tr><td><a href="{html.escape(name)}">{html.escape(name)}</a></td>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    lead = (
        "<p>Every recorded run of the benchmark; below, the newest of each device. Written by "
        "<code>python -m orthonorm bench results</code> from the files beside it.</p>"
        f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
    )
    return page.page([run for _, run in latest(found).values()], "orthonorm results", lead)


def _figure(claim: dict[str, Any]) -> str:
    if claim["unit"] != "x":
        return f"{claim['figure']:.3g}{claim['unit']}"
    return f"{claim['figure']:.3g}x {'faster' if claim['relation'] == '>=' else 'of it'}"


def _errors(claim: dict[str, Any]) -> str:
    parts = [f"{claim[k]:.0e}".replace("e-0", "e-") for k in ("error", "other_error") if claim[k]]
    return " / ".join(parts)


def readme_table(name: str, run: Run) -> str:
    """Return the table of a run's promises: figure, target, errors, and which were not held."""
    lines = [
        f"Measured on {run.title} ([{name}](bench/results/{name})):",
        "",
        "| what | against | reached | target | error, ours / its |",
        "|---|---|---|---|---|",
    ]
    for c in run.claims:
        target = f"{c['relation']} {c['target']:g}{c['unit']}".replace(">=", "≥").replace("<=", "≤")
        missed = "" if c["held"] else ", not held"
        cells = (c["what"], c["against"], _figure(c), target + missed, _errors(c))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme(text: str, found: dict[str, Run], folder: Path = FOLDER) -> str:
    """Return the README with its generated blocks replaced."""
    tables = []
    chosen = [(name, run) for name, run in latest(found).values() if run.claims]
    for kind in (True, False):  # the newest GPU and the newest CPU in full, links to the others
        of_kind = [c for c in chosen if c[1].environment["device"].startswith("NVIDIA") == kind]
        tables += [readme_table(*c) for c in of_kind[:1]]
        others = [f"[{run.title}](bench/results/{name})" for name, run in of_kind[1:]]
        if others:
            tables.append(f"Of other machines, as they were then: {'; '.join(others)}.")
    if not any(run.environment["device"].startswith("NVIDIA") for run in found.values()):
        tables.append("GPU: not measured.")
    body = "\n\n".join(tables)
    blocks = {BLOCK: body, OPTIMIZERS: optimizers(folder), RANKS: scaling(folder)}
    for block, what in blocks.items():
        text = replaced(text, block, what)
    return text


def scaling(folder: Path) -> str:
    """Return the table of the step on several ranks, from the newest record."""
    found = [(path.name, json.loads(path.read_text())) for path in folder.glob("ranks-*.json")]
    if not found:
        return "Steps on several ranks: not measured."
    return ranks.table(*max(found, key=lambda record: record[1]["environment"]["date"]))


def optimizers(folder: Path) -> str:
    """Return the table of the optimizers' losses, and a link to their curves."""
    path = folder / "optimizers.json"
    if not path.exists():
        return "Losses of all under one tuning budget: not measured."
    curves = "![Validation loss against steps and seconds](bench/results/optimizers.png)"
    return f"{comparison.table(json.loads(path.read_text()))}\n\n{curves}"


def replaced(text: str, block: re.Pattern[str], body: str) -> str:
    """Return the text with the body of a block replaced; raise ValueError if it has no block."""
    if not block.search(text):
        raise ValueError(f"bench: {README} has no block to write, {block.pattern}")
    return block.sub(lambda m: f"{m[1]}{body}\n{m[2]}", text)


def written(folder: Path = FOLDER) -> Sequence[tuple[Path, str]]:
    """Return (path, text) of every generated file."""
    found = runs(folder)
    return [
        (INDEX, index(found)),
        (README, readme(README.read_text(), found, folder)),
        (support.PAGE, support.page()),
    ]


def main(options: argparse.Namespace, run: Run) -> None:
    """Write all generated files."""
    if not README.exists():
        raise ValueError("bench: results are written in a source tree only")
    for path, text in written():
        path.write_text(text)
        print(f"wrote {path}")
