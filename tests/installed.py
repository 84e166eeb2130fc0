"""Run by CI inside a fresh environment, outside the checkout: the installed package is whole.

python tests/installed.py compiled|pure
"""

from __future__ import annotations

import sys
from importlib.metadata import files
from pathlib import Path

import orthonorm
import torch
from orthonorm import optim
from orthonorm.__main__ import main

kind = sys.argv[1]
library = orthonorm.LOADED.libraries["_C.so"]
assert library == ("not built" if kind == "pure" else "loaded"), library
assert Path(orthonorm.__file__).parent.parent.name == "site-packages", orthonorm.__file__

names = {str(f) for f in files("orthonorm") or []}
for module in ("orthonorm/kernels/__init__.py", "orthonorm/bench/cases.py",
               "orthonorm/examples/train_lm.py", "orthonorm/py.typed"):  # fmt: skip
    assert module in names, f"{module} is missing from the {kind} build"
assert any(n.endswith(".so") for n in names) == (kind != "pure")

torch.manual_seed(0)
X = torch.randn(4, 60, 40)
sigma = torch.linalg.svdvals(orthonorm.polar(X))
assert sigma.min() > 0.8 and sigma.max() < 1.2, sigma
model = torch.nn.Linear(8, 6)
for cls in (optim.Muon, optim.Conda):
    opt = cls(optim.split_params(model), lr=0.1)
    before = model.weight.detach().clone()
    model(torch.randn(5, 8)).square().sum().backward()
    opt.step()
    assert not torch.equal(model.weight, before) and model.weight.isfinite().all()
assert main([]) == 0
print(f"{kind}: the installed package works")
