# Every target makes its own environment first; it needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-slow check clean

quickstart: $(VENV)/.train  ## the main job: the digits teacher becomes a one-step student
	$(BIN)/distill run quickstart $(ARGS)

test: $(VENV)/.dev  ## the tests; a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

test-slow: $(VENV)/.dev  ## what takes minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses auto --dist loadfile

check: $(VENV)/.dev  ## style, types and the directions of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version 2>&1) was found: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.train: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:  ## remove the environment; data/ and runs/ stay
	rm -rf $(VENV)
