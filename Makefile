# Each target works on a fresh machine: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-all lint types audit lowest notebooks clean
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
# In order: xdist would leave the longest files, which have few tests, for the end.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
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

# The quickstart with the lowest versions that pyproject.toml allows, in a folder that is removed. Not in .ci/run: it
# takes seven minutes on 2 cores, four of them to install. The oldest wheels are for Python 3.10 to 3.12.
lowest:
	rm -rf .lowest && $(PYTHON) -m venv .lowest/venv
	$(PYTHON) .ci/lowest.py > .lowest/constraints.txt
	.lowest/venv/bin/python -m pip install --quiet --constraint .lowest/constraints.txt '.[completion,onnx]'
	cd .lowest && venv/bin/rexnet-lit sample digits
	cd .lowest && venv/bin/rexnet-lit fit digits --config quickstart --trainer.max_epochs 1 --trainer.limit_train_batches 4
	cd .lowest && venv/bin/rexnet-lit test lightning_logs/version_0/model.safetensors
	cd .lowest && venv/bin/rexnet-lit predict lightning_logs/version_0/model.safetensors digits/test/7
	cd .lowest && venv/bin/rexnet-lit export lightning_logs/version_0/model.safetensors --format onnx --output model.onnx
	cd .lowest && venv/bin/rexnet-lit check digits --config quickstart
	cd .lowest && venv/bin/rexnet-lit completion bash > /dev/null
	rm -rf .lowest

notebooks: install
	$(BIN)/python -m pytest -m '' tests/test_notebooks.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
