# `make help` lists the targets. ARGS passes Hydra overrides: make depth ARGS="model=auto model.path=DIR".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Files go to a worker for each core, so that tests of one file share what it made; ARGS="-n 0" is one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder
# The table of stages declares them; the help text and the checks read the same one.
STAGES := $(shell sed -n 's/^    "\([a-z_]*\)": Stage.*/\1/p' src/ppcl/stages/__init__.py)

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  $(STAGES): one stage each; ARGS=\"key=value ...\" passes Hydra overrides"

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); about two minutes the first time."
	@# torch first, by its exact pin: an installer that knows a CPU build then takes no other.
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.PHONY: setup
setup: $(VENV)/.ready ## Make .venv and install ppcl with its development tools

.PHONY: demo
demo: setup ## Detect, distil, export, draw and score on the embedded teacher (runs/demo)
	$(BIN)/ppcl experiment=demo $(ARGS)

.PHONY: test
test: setup ## Run the tests, on every core
	$(PYTEST) $(ARGS)

.PHONY: test-fast
test-fast: setup ## Run the tests of units and of the configuration alone, under three minutes
	$(PYTEST) tests/unit tests/conf $(ARGS)

.PHONY: bench
bench: setup ## Measure steps, trainings and detection against the plain way, 20 minutes on two idle cores (runs/bench)
	$(BIN)/python -m experiments.scale.run $(ARGS)

.PHONY: lint
lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: clean
clean: ## Remove the environment and caches, not runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

.PHONY: $(STAGES)
$(STAGES): setup
	$(BIN)/ppcl 'stages=[$@]' $(ARGS)
