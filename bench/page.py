"""One self-contained page of runs: machine, roofline, speedups, errors over time, every row.

Styles and plots are in the file, so it needs no network.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from . import report, svg
from .ceilings import COPY
from .figures import COLORS, figures
from .records import Run, grouped

STYLE = """
:root{--ink:#1c2330;--soft:#5b6677;--paper:#fbfbf9;--card:#fff;--rule:#e3e5e8;--ours:#d1495b;
--reference:#8d99ae;--torch:#2e6f95;--package:#4d9078;--exact:#9a6fb0;--floor:#c9a227}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa5b4;--paper:#14181f;--card:#1b212b;
--rule:#2c3440;--ours:#ff6b7d;--reference:#7c889c;--torch:#5aa9d6;--package:#6fc3a4;--exact:#c39bd8;
--floor:#e0bf4c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1380px;padding:2.2rem 1.6rem 4rem;color:var(--ink);
background:var(--paper);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
h1{font-size:1.7rem;margin:0 0 .2rem;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem}
h3{font-size:1rem;margin:1.5rem 0 .35rem}p{max-width:72ch;color:var(--soft);margin:.2rem 0 .8rem}
a{color:var(--torch)}.cards{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:.55rem .85rem}
.card b{display:block;font-size:1.05rem}.card span{color:var(--soft);font-size:.8rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1rem}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:.9rem}
figcaption{color:var(--soft);font-size:.85rem;margin-bottom:.4rem}
svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:var(--soft)}
svg .heading{fill:var(--ink);font-weight:600}.grid{stroke:var(--rule)}
.limit{stroke:var(--floor);fill:none;stroke-width:1.6;stroke-dasharray:5 3}
.legend{display:flex;flex-wrap:wrap;gap:1rem;margin:.6rem 0;font-size:.85rem}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.87rem}
th{text-align:right;color:var(--soft);font-weight:500}th:first-child,td:first-child{text-align:left}
th,td{padding:.2rem .7rem .2rem 0;border-bottom:1px solid var(--rule);text-align:right}
td{white-space:nowrap}
tr.ours td:first-child{font-weight:600;color:var(--ours)}.scroll{overflow-x:auto}
code{font:12px/1.4 ui-monospace,Menlo,Consolas,monospace;color:var(--soft);overflow-wrap:anywhere}
.note{color:var(--soft);font-size:.85rem;margin:.15rem 0}.bad{color:var(--ours);font-weight:600}
"""
for _color in COLORS:
    STYLE += f"circle.{_color}{{fill:var(--{_color});fill-opacity:.8}}"
    STYLE += f"rect.{_color}{{fill:var(--{_color})}}"


def _cards(run: Run) -> str:
    e = run.environment
    found: list[tuple[str, Any]] = [
        (e["device"], e.get("instructions", "")),
        (
            f"{e['threads']} threads",
            f"{e['cores']} cores" + (", pinned" if e.get("pinned") else ""),
        ),
        (f"torch {e['torch']}", f"Python {e['python']}, {e['system']}"),
        (f"orthonorm {e['orthonorm']}", f"commit {e['commit']}"),
        (e["date"][:10], f"load {e['load']} at the start"),
    ]
    for name, value in run.ceilings.items():
        words = "copy, both directions" if name == COPY else f"{name} product"
        found.append((report.scaled(value, "B/s" if name == COPY else "FLOP/s"), words))
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{html.escape(str(a))}</b><span>{html.escape(str(b))}</span></div>'
        for a, b in found
    ) + "</div>"  # fmt: skip


def _rows(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Return an HTML table of rows (class, cells)."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
        for kind, cells in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _claims(run: Run) -> str:
    if not run.claims:
        return ""
    rows = [
        ("" if c["held"] else "bad",
         (c["what"], c["against"], c["ours"], c["other"], f"{c['figure']:.3g}{c['unit']}",
          f"{c['relation']} {c['target']:g}{c['unit']}", "held" if c["held"] else "not held"))
        for c in run.claims
    ]  # fmt: skip
    head = ("promise", "against", "ours", "other", "figure", "target", "")
    return f"<h2>Promises</h2>{_rows(head, rows)}"


def _groups(run: Run) -> Iterable[str]:
    for members in grouped(run.records):
        yield f"<h3>{html.escape(report.title(members))}</h3>"
        timed = [r for r in members if r.median_ms is not None]
        if timed:
            head, *rows = report.cells(timed)
            yield _rows(head, zip((r.kind for r in timed), rows, strict=True))
        for r in members:
            if r.note:
                yield f'<p class="note">{html.escape(f"{r.backend}: {r.note}")}</p>'
        yield f"<code>{html.escape(members[0].command)}</code>"


def _section(run: Run) -> str:
    plots = "".join(
        f"<figure><figcaption>{html.escape(figure.caption)}</figcaption>{svg.draw(figure)}</figure>"
        for figure in figures(run)
    )
    legend = "".join(
        f'<span><i style="background:var(--{kind})"></i>{words}</span>'
        for kind, words in COLORS.items()
    )
    return "\n".join([
        f"<section><h2>{html.escape(run.title)}</h2>", _cards(run),
        f'<div class="legend">{legend}</div><div class="plots">{plots}</div>', _claims(run),
        "<h2>Every row</h2><p>Medians per call; p10 and p90 relative to them, ! where a row is "
        "noisy; the ceiling that binds and the share of it that the nominal work reaches.</p>",
        *_groups(run), "</section>",
    ])  # fmt: skip


def page(runs: Sequence[Run], title: str = "orthonorm benchmark", lead: str = "") -> str:
    """Return the page of one run or several."""
    return "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>{lead}",
        *(_section(run) for run in runs),
        "</body></html>\n",
    ])  # fmt: skip
