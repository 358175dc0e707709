# Two switches, for any target but gpu:
#   PYTHON=python3.12   the Python to use
#   VENV=no             use it as it is, with the packages that it has: make no virtual environment,
#                       install nothing, need no network. A missing ruff or mypy is skipped.

PYTHON = python3
VENV = .venv
OUT ?= out/gpu
BUDGET ?= 540

ifeq ($(VENV),no)
READY =
PY = PYTHONPATH="$(CURDIR)" $(PYTHON)
with = if $(PY) -c 'import $(1)' 2> /dev/null; then $(2); else echo '$(1) is not installed: skipped'; fi
else
READY = $(VENV)/installed
PY = $(VENV)/bin/python
with = $(2)
endif

.DEFAULT_GOAL = help
.PHONY: help demo test lint types bench gpu wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

# Its networks are small; two threads would starve each other where other work takes a core.
demo: $(READY) ## what this machine can run, every kernel checked, then four networks that learn
	$(PY) -m gpunn doctor
	$(PY) -m gpunn check
	OMP_NUM_THREADS=1 $(PY) -m gpunn demo neuron digits transformer gan --quick

test: lint types ## lint, types, then every test, in parallel
	$(PY) -m pytest -n auto

lint: $(READY) ## ruff: rules and format
	@$(call with,ruff,$(PY) -m ruff check && $(PY) -m ruff format --check)

types: $(READY) ## mypy
	@$(call with,mypy,$(PY) -m mypy)

bench: $(READY) ## time the kernels; with no GPU, read what they cost from their machine code
	$(PY) -m gpunn profile

# Installs into $(PYTHON) itself, from this folder alone.
gpu: ## on a machine with a GPU: the tests of kernels, then the benchmark, in BUDGET seconds, into OUT
	started=$$(date +%s) && rm -rf build && \
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation . && \
	$(PYTHON) -m gpunn.profiling.gpu_run \
		--started $$started --budget $(BUDGET) --out "$(OUT)" --commit "$(COMMIT)"

wheel: $(READY) ## the source distribution, and the wheel built from it, into dist/
	$(PY) -m build --no-isolation

clean: ## remove what the other targets made, except for the virtual environment
	rm -rf out build dist gpunn.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# PyTorch's CUDA build insists on one version of Triton and of NVRTC. Its CPU build asks for
# neither: only then do the versions in constraints.txt hold. CuPy is the one for PyTorch's CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -v -e '^triton' -e '^nvidia' constraints.txt > $(VENV)/constraints.txt
	$(PY) -m pip install --constraint $(VENV)/constraints.txt torch
	$(PY) -m pip show torch | grep '^Requires:.*triton' || cp constraints.txt $(VENV)
	cuda=$$($(PY) -c 'import torch; print((torch.version.cuda or "13")[:2])') && \
	$(PY) -m pip install --constraint $(VENV)/constraints.txt --editable ".[dev,cuda$$cuda]"
	touch $@
