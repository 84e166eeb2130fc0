"""Generated pages: the index of `bench/results`, the tables of README and docs, the support matrix.

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
ROOT = FOLDER.parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "distributed.md")
# <!-- table: NAME --> ... <!-- end of NAME -->, with one of the names of `tables`
BLOCK = re.compile(r"(<!-- table: ([a-z ]+) -->\n).*?(<!-- end of \2 -->)", re.S)
# What the README shows of the claims, by `what` and `against`.
HEADLINES = {
    ("muon, a step of llama-3m", "torch.optim.Muon"): "Muon's step, 3 M parameters",
    ("muon, a step of gpt2-small", "torch.optim.Muon"): "Muon's step, GPT-2 small",
    ("newton_schulz 500x32x32 bfloat16", ""): "Newton-Schulz, 500 of 32x32",
    ("newton_schulz 64x128x128 bfloat16", ""): "Newton-Schulz, 64 of 128x128",
    ("newton_schulz 12x768x768 auto", ""): "Newton-Schulz, 12 of 768x768",
    ("newton_schulz 768x3072 bfloat16", ""): "Newton-Schulz, 768x3072",
    ("newton_schulz 2048x2048 auto", ""): "Newton-Schulz, 2048x2048",
    ("100 layers of 64x64", "torch spectral_norm"): "spectral norms of 100 layers of 64x64",
    ("conda_step_, 21 M parameters", "eager, three products"): "Conda's step, 21 M parameters",
}
DEVICES = 3  # with tables of their promises; the index page has all
SHOWN = ("Muon", "NorMuon", "Scion", "SCALE", "Conda", "SOAP", "AdamW")  # of all optimizers


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


def claims_table(name: str, run: Run) -> str:
    """Return the table of a run's promises: figure, target, errors, and which were not held."""
    held = sum(bool(c["held"]) for c in run.claims)
    lines = [
        f"{run.title} ([{name}](../bench/results/{name})): {held} of {len(run.claims)} held.",
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


def claimed(found: dict[str, Run]) -> list[tuple[str, Run]]:
    """Return the newest run with promises of the DEVICES measured last, GPUs first."""
    chosen = [(name, run) for name, run in latest(found).values() if run.claims]
    return sorted(chosen, key=lambda pair: not on_gpu(pair[1]))[:DEVICES]


def on_gpu(run: Run) -> bool:
    """True if the run was measured on a GPU."""
    return bool(run.environment["device"].startswith("NVIDIA"))


def headlines(found: dict[str, Run]) -> str:
    """Return the table of HEADLINES, one machine a column."""
    columns = claimed(found)
    if not columns:
        return "Not measured."
    head = ["", "against", *(run.environment["device"] for _, run in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (what, against), title in HEADLINES.items():
        cells = []
        for _, run in columns:
            same = [c for c in run.claims
                    if c["what"] == what and c["against"].startswith(against)]  # fmt: skip
            cells.append(f"{same[0]['figure']:.3g}x" if same else "-")
            other = same[0]["against"] if same else ""
        lines.append("| " + " | ".join([title, against or other, *cells]) + " |")
    return "\n".join([*lines, "", gpus(found)])


def gpus(found: dict[str, Run]) -> str:
    """Return the sentence that there is no GPU's run, or nothing."""
    return "" if any(map(on_gpu, found.values())) else "GPU: not measured."


def claims(found: dict[str, Run]) -> str:
    """Return the tables of all promises, a machine each, the newest run first."""
    return "\n\n".join([*(claims_table(*pair) for pair in claimed(found)), gpus(found)]).rstrip()


def scaling(folder: Path) -> str:
    """Return the table of the step on several ranks, from the newest record."""
    found = [(path.name, json.loads(path.read_text())) for path in folder.glob("ranks-*.json")]
    if not found:
        return "Steps on several ranks: not measured."
    return ranks.table(*max(found, key=lambda record: record[1]["environment"]["date"]))


def losses(folder: Path, only: Sequence[str] = ()) -> str:
    """Return the table of the optimizers' losses under one tuning budget; of `only` some."""
    path = folder / "optimizers.json"
    if not path.exists():
        return "Losses under one tuning budget: not measured."
    return comparison.table(json.loads(path.read_text()), only)


def tables(found: dict[str, Run], folder: Path) -> dict[str, str]:
    """Return all generated tables by the names that pages have for them."""
    return {
        "headlines": headlines(found),
        "claims": claims(found),
        "ranks": scaling(folder),
        "optimizers": losses(folder),
        "some optimizers": losses(folder, SHOWN),
    }


def filled(text: str, bodies: dict[str, str]) -> str:
    """Return a page with its generated tables replaced."""

    def block(m: re.Match[str]) -> str:
        if m[2] not in bodies:
            raise ValueError(f"bench: a table must be one of {sorted(bodies)}, got {m[2]!r}")
        return f"{m[1]}{bodies[m[2]]}\n{m[3]}"

    return BLOCK.sub(block, text)


def written(folder: Path = FOLDER) -> Sequence[tuple[Path, str]]:
    """Return (path, text) of every generated file."""
    found = runs(folder)
    bodies = tables(found, folder)
    pages = [(path, filled(path.read_text(), bodies)) for path in PAGES]
    return [(INDEX, index(found)), *pages, (support.PAGE, support.page())]


def main(options: argparse.Namespace, run: Run) -> None:
    """Write all generated files."""
    if not README.exists():
        raise ValueError("bench: results are written in a source tree only")
    for path, text in written():
        path.write_text(text)
        print(f"wrote {path}")
