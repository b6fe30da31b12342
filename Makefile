# Two commands matter to a newcomer: `make demo` and `make test`. Both set everything up first, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint docs proto build clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.complete ## Create .venv with everything pinned in constraints.txt

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "pfedsecure needs Python 3.11 or newer; give one with: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Setting up $(VENV). The first time this downloads PyTorch, about 3 GB, and takes some minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip install --python $(BIN)/python --constraint constraints.txt --compile-bytecode --editable '.[dev]'
	@touch $@

demo: setup ## Run a federation of five clients over mutual TLS and show what came of it
	$(BIN)/pfed demo

test: setup ## Run the fast tests, as many at a time as there are cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: setup ## Run the tests that take longer; those that start many processes one at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist worksteal --ignore tests/e2e --ignore tests/docs
	$(BIN)/python -m pytest -m slow tests/e2e tests/docs

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pfedsecure server/pfed_server client/pfed_client cli/pfed_cli benchmarks

docs: setup ## Build the pages and the API reference into build/docs, and check every link
	$(BIN)/python docs/site build/docs

proto: setup ## Generate the Python side of proto/ anew
	$(BIN)/python proto/generate.py

build: setup ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## Remove what was made, but not certificates and states
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
