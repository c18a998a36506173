# `make help` lists the targets. Everything is installed into .venv; nothing else is touched.
#
#   make PYTHON=python3.12 demo   another interpreter, 3.11 or later
#   make BENCH="--steps 20 --rounds 5 --peers diffusers,diffusers-channels-last,openvino" bench   more rounds, in hours

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BENCH ?= --dtype float32,bfloat16 --steps 2 --rounds 2 --peers diffusers,diffusers-channels-last,openvino

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest bench lint format train clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/core.stamp ## Repaint some drawn scenes with the included checkpoint: writes out/sdinpaint-demo.png
	$(BIN)/sdinpaint demo --out out

# Two workers of one thread each: more of either would compete for memory, which the tests at full width need.
test: lint ## Run the linters and all tests; CPU only, no network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-lowest: $(LOWEST)/stamp ## Run the tests with the lowest versions that pyproject.toml declares, without the peers
	OMP_NUM_THREADS=1 PYTHONPATH=tools $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -p without_peers \
	    -m "not peer and not slow and not gpu"

bench: $(VENV)/dev.stamp ## Measure beside diffusers, in both its layouts, and OpenVINO: hours of an idle machine; see BENCH
	$(BIN)/sdinpaint bench all $(BENCH)

lint: $(VENV)/dev.stamp ## Check style, types, imports, docstrings, and that the page of error codes is up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_docstrings.py
	$(BIN)/python tools/house.py --quiet
	$(BIN)/python tools/error_codes.py --check

format: $(VENV)/dev.stamp ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

train: $(VENV)/dev.stamp ## Train the demo checkpoint again into out/training; hours, and it can be stopped and resumed
	$(BIN)/python -m sdinpaint.training --out out/training

clean: ## Remove .venv, caches and builds; out/ stays
	rm -rf $(VENV) $(LOWEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is older than what it depends on exactly when something must be installed again.
$(VENV)/core.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "sdinpaint needs Python 3.11 or later, and '$(PYTHON)' is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV), once. PyTorch is large: this takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

# open_clip_torch holds CLIP's vocabulary as a file; nothing is imported from it, so its requirements are not needed.
$(VENV)/dev.stamp: $(VENV)/core.stamp
	@echo "Installing what the tests need."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) install --no-deps open_clip_torch==3.3.0
	@touch $@

$(LOWEST)/stamp: pyproject.toml tools/lowest.py
	@echo "Installing the lowest versions into $(LOWEST), once. PyTorch is large: this takes minutes."
	@$(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python tools/lowest.py >$(LOWEST)/constraints.txt
	@$(LOWEST)/bin/python -m pip --disable-pip-version-check --quiet install -c $(LOWEST)/constraints.txt \
	    -e '.[mask,train]' pytest pytest-xdist hypothesis build hatchling
	@$(LOWEST)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps open_clip_torch==3.3.0
	@touch $@
