# Two commands from a fresh clone: `make demo` and `make test`. Both set up .venv and build first.
#
# TORCH is what pip installs into .venv. With a CUDA torch already in the active Python, .venv uses it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= dev
VENV := .venv
PY := $(VENV)/bin/python
HAS_CUDA_TORCH := $(shell $(PYTHON) -c "import torch; print(int(torch.version.cuda is not None))" 2>/dev/null)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: demo test frameworks docs bench optimizers results lint cpp cuda wheel-cuda clean help

help:
	@echo "make demo   train a small language model with AdamW, Muon and Conda (about five minutes)"
	@echo "make test   run every test this machine can run"
	@echo "make docs   API reference and guides in build/docs; make frameworks (Trainer, Lightning, ...)"
	@echo "make bench  time the ops against their peers; make lint; make cpp (C++ tests, sanitizers);"
	@echo "make cuda   compile the CUDA kernels with nvcc, no GPU needed, and report on them"
	@echo "make wheel-cuda   the wheel with CUDA kernels in dist/cuda13, by nvcc 13 and a CUDA 13 torch"

$(VENV)/installed:
	$(PYTHON) -m venv $(if $(filter 1,$(HAS_CUDA_TORCH)),--system-site-packages) $(VENV)
	$(if $(filter 1,$(HAS_CUDA_TORCH)),,$(PY) -m pip install -q "$(TORCH)")
	$(PY) -m pip install -q "setuptools>=77" wheel ninja
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

demo: $(VENV)/built
	$(PY) -m orthonorm train --preset demo --resume --out runs/demo

test: $(VENV)/built
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What tests/test_frameworks.py and docs/frameworks.md run with; torchtitan would bring data sets and
# loggers, which these do not need. timm imports torchvision, which lies apart: one that was built for
# another torch breaks what tries it. Emerging-Optimizers asks for Python 3.12 for one name of `typing`.
frameworks:
	$(MAKE) EXTRAS=dev,frameworks -W setup.py $(VENV)/built
	$(PY) -m pip install -q --no-deps timm==1.0.31 torchtitan==0.3.0 tyro spmd_types==0.2.3 torchdata \
		torch_checkpointing einops docstring_parser typeguard gram-newton-schulz==0.1.6 absl-py
	$(PY) -m pip install -q --no-deps --upgrade --target $(VENV)/torchvision torchvision==0.28.0
	$(PY) -m pip install -q --no-deps --ignore-requires-python emerging-optimizers==0.3.0

docs: $(VENV)/built
	$(PY) docs/build.py build/docs

bench: $(VENV)/built
	$(PY) -m orthonorm bench claims

optimizers: $(VENV)/built
	$(PY) -m orthonorm.examples.compare_optimizers --json bench/results/optimizers.json --plot bench/results/optimizers.png

results: $(VENV)/built
	$(PY) -m orthonorm bench results

lint: $(VENV)/built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

cpp:
	cmake -S . -B build/cpp -DSANITIZE=ON
	cmake --build build/cpp -j 2
	ctest --test-dir build/cpp -j 2 --output-on-failure

cuda: $(VENV)/built
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build/cuda -DWITH_CUDA=ON -DBUILD_TESTING=OFF
	cmake --build build/cuda -j 2 --target _C_cuda
	$(PY) -m orthonorm.bench.cuda_report --out bench/results/cuda_compile.json

# With an environment of its own: .venv may have a CPU build of torch.
CUDA_VENV := build/$(subst ==,-,$(TORCH))
wheel-cuda:
	$(MAKE) VENV=$(CUDA_VENV) $(CUDA_VENV)/installed
	PATH="$(CURDIR)/$(CUDA_VENV)/bin:$$PATH" PYTHON=$(CUDA_VENV)/bin/python .ci/wheel-cuda

clean:
	rm -rf build dist $(VENV) runs python/*.egg-info python/orthonorm/*.so
