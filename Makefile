# `make help` lists the targets. ARGS passes Hydra overrides: make depth ARGS="model=auto model.path=DIR".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Where torch is taken from, for a machine without a GPU: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Files go to a worker for each core, so that tests of one file share what it made; ARGS="-n 0" is one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder
# Read off the table of stages, as the help text is.
STAGES := $(shell sed -n 's/^    "\([a-z_]*\)": Stage.*/\1/p' src/ppcl/stages/__init__.py)

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "One stage each; ARGS=\"key=value ...\" passes overrides:"
	@$(PYTHON) -c "import runpy, textwrap; \
	lines = runpy.run_path('src/ppcl/stages/__init__.py')['help_lines']().splitlines(); \
	print(*(textwrap.fill(line, 100, subsequent_indent=' ' * 20) for line in lines), sep='\n')"

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); about two minutes the first time."
	@# torch first, by its pin: an installer that knows of a CPU build then takes that one.
	@$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		"$$(grep '^torch==' constraints.txt)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "Done. Next: . $(VENV)/bin/activate && ppcl experiment=try"

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

.PHONY: test-notebooks
test-notebooks: setup ## Run every notebook on a tiny finished run, under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration/test_notebooks.py $(ARGS)

.PHONY: test-models
test-models: setup ## Take tiny pipelines of 13 architectures through the stages, 3 minutes
	PPCL_TEST_MODELS=1 $(PYTEST) tests/integration/test_pipelines_one.py tests/integration/test_pipelines_two.py $(ARGS)

.PHONY: battery
battery: setup ## Damage, kill, misuse and attack tiny runs, 20 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.battery $(ARGS)

.PHONY: test-wheel
test-wheel: setup ## Install the wheel into an empty environment and run it there, a few minutes
	PPCL_TEST_WHEEL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration/test_wheel.py $(ARGS)

.PHONY: bench
bench: setup ## Measure speed and memory against plain ways, 20 minutes on two idle cores
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
