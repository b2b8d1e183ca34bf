# Every target sets up what it needs in .venv with pip; nothing but Python is expected on the machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
TESTS ?= tests
PYTEST_FLAGS ?= -q
WORKERS ?= auto
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart loop picture test test-grid test-processors test-mutations lint types

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

quickstart: $(INSTALLED) ## set up, then tune, reward, PPO and evaluate the embedded model (offline after set-up)
	HF_HUB_OFFLINE=1 $(BIN)/align run $(ARGS)

loop: $(DEVELOPED) ## the quickstart, labels by a scripted judge, reward model and PPO again
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/loop.py $(ARGS)

picture: $(INSTALLED) ## draw docs/answers.svg from a run: one held-out question, answered by every stage (ARGS=runs/RUN)
	$(BIN)/python benchmarks/picture.py $(ARGS)

test: $(DEVELOPED) ## set up, then run the tests (TESTS=tests/align for some of them)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS) $(TESTS)

test-grid: $(DEVELOPED) ## run the cells of the grids that `make test` leaves out (some half an hour on two cores)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS) -m grid $(TESTS)

test-processors: $(DEVELOPED) ## run the tests that compute as other processors would (half an hour on two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.processors $(PYTEST_FLAGS)

test-mutations: $(DEVELOPED) ## turn each detail of PPO wrong in a copy of the tree; its tests must fail (some four minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.rl_mutations

lint: $(DEVELOPED) ## check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEVELOPED) ## check types with mypy
	$(BIN)/mypy

$(BIN)/python:
	@echo "making $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): torch and its companions, some minutes on a slow line"
	@$(PIP) --editable .
	@touch $@

$(DEVELOPED): $(INSTALLED)
	@echo "installing the tools for tests, lint and types"
	@$(PIP) --quiet --editable '.[dev]'
	@touch $@
