"""API reference (by pdoc, from docstrings) and guides as HTML: `python docs/build.py FOLDER`.

Warnings are errors, and so are public names without a docstring and broken links to files.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import warnings
from html import escape
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import markdown2
import pdoc
from orthonorm import OPS, ops
from orthonorm._library import Op

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    "orthonorm", "orthonorm.optim", "orthonorm.nn",
    "orthonorm.monitor", "orthonorm.distributed", "orthonorm.compat", "orthonorm.compat.dion",
    "orthonorm.compat.emerging_optimizers", "orthonorm.compat.gram_newton_schulz",
    "orthonorm.compat.modded_nanogpt", "orthonorm.compat.muon", "orthonorm.compat.timm",
    "orthonorm.compat.transformers",
]  # fmt: skip
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md",
         ROOT / "CHANGELOG.md"]  # fmt: skip
SAYING = (type, FunctionType, Op)  # kinds of public names that must have a docstring
EXTRAS = ["fenced-code-blocks", "tables", "header-ids", "cuddled-lists"]
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ max-width: 60rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif }}
nav {{ border-bottom: 1px solid #ccc; padding-bottom: .5rem }} nav a {{ margin-right: 1rem }}
pre {{ background: #f5f5f5; padding: .7rem; overflow-x: auto }}
table {{ border-collapse: collapse }}
td, th {{ border: 1px solid #ccc; padding: .2rem .5rem; text-align: left }}
{css}</style></head><body><nav>{nav}</nav>{body}</body></html>
"""


def reference(folder: Path) -> int:
    """Write pages of the modules and return how many; exit if a public name has no docstring."""
    modules = list(MODULES)
    if find_spec("torchtitan"):  # this module of ours imports torchtitan
        modules.append("orthonorm.compat.torchtitan")
    for name in modules:
        module = importlib.import_module(name)
        public = [getattr(module, name) for name in module.__all__]
        silent = [x for x in public if isinstance(x, SAYING) and not x.__doc__]
        if not module.__doc__ or silent:
            raise SystemExit(f"{name}: no docstring of {silent or 'the module'}")
    for name, op in OPS.items():  # pdoc shows functions, not ops
        setattr(ops, name, op.__wrapped__)
    pdoc.render.configure(docformat="google", show_source=False)
    # pdoc 16 looks for types of a NamedTuple's fields in the module that exports, not defines, it
    warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef")
    pdoc.pdoc(*modules, output_directory=folder)
    return len(modules)


def guide(page: Path, folder: Path) -> None:
    """Write a Markdown page as HTML, with the files it links to."""
    text = re.sub(r"<!--.*?-->\n?", "", page.read_text(), flags=re.S)
    html = str(markdown2.markdown(text, extras=EXTRAS))
    html = re.sub(
        r'href="(?!https?:)([^"#]+)', lambda m: f'href="{target(page, m[1], folder)}', html
    )
    names = [p.stem for p in PAGES]
    nav = "".join(f'<a href="{n}.html">{n.replace("_", " ")}</a>' for n in names)
    nav += '<a href="api/index.html">API</a>'
    css = (Path(pdoc.__file__).parent / "templates" / "syntax-highlighting.css").read_text()
    name = escape(page.stem.replace("_", " "))
    (folder / f"{page.stem}.html").write_text(PAGE.format(title=name, css=css, nav=nav, body=html))


def target(page: Path, link: str, folder: Path) -> str:
    """Return a link's target in the folder: another page, or a copy of a file or folder."""
    path = (page.parent / link).resolve()
    if not path.exists():
        raise SystemExit(f"{page.name}: {link} is not there")
    if path in PAGES:
        return f"{path.stem}.html"
    copy = folder / path.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, copy, dirs_exist_ok=True)
    else:
        shutil.copy(path, copy)
    return copy.relative_to(folder).as_posix()


def main(folder: Path) -> None:
    """Write all guides and the API reference to a folder."""
    warnings.simplefilter("error")
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        guide(page, folder)
    (folder / "index.html").write_bytes((folder / "README.html").read_bytes())
    documented = reference(folder / "api")
    print(f"{len(PAGES)} guides and the reference of {documented} modules in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
