# Each target works on a fresh machine: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-all lint types audit notebooks clean
.DEFAULT_GOAL := quickstart

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The sample dataset, a fit, a test, a prediction: the commands you would type yourself.
RUN := $(BIN)/python -m rexnet_lit
LATEST = $$(ls -td runs/lightning_logs/version_* | head -n 1)
quickstart: install
	test -d data/digits || $(RUN) sample data/digits
	$(RUN) fit data/digits --config quickstart --trainer.default_root_dir runs
	$(RUN) test $(LATEST)/model.safetensors
	$(RUN) predict $(LATEST)/model.safetensors data/digits/test/7 --trainer.default_root_dir runs

# Two test files at a time; a failing test is easier to look at alone: .venv/bin/python -m pytest tests/test_NAME.py
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
test: install
	$(PYTEST) -m 'not slow'

test-all: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# Known holes in what is installed; it lists the packages that the index says nothing of.
audit: install
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable --progress-spinner off

notebooks: install
	$(BIN)/python -m pytest -m '' tests/test_notebooks.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
