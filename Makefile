# `make help` lists the targets. Everything is installed into .venv; nothing else is touched.
#
#   make PYTHON=python3.12 demo   another interpreter (3.11 to 3.13)
#   make BENCH="--steps 20 --rounds 5 --peers diffusers,diffusers-channels-last,openvino" bench   more, in some hours

PYTHON ?= python3
VENV ?= .venv
BENCH ?= --dtype float32,bfloat16 --steps 2 --rounds 2 --peers diffusers,openvino

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint format train clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/core.stamp ## Repaint some drawn scenes with the included checkpoint: writes out/sdinpaint-demo.png
	$(BIN)/sdinpaint demo --out out

# Two workers of one thread each: more of either would compete for memory, which the tests at full width need.
test: lint ## Run the linters and all tests; CPU only, no network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(VENV)/dev.stamp ## Measure beside diffusers and OpenVINO: about an hour of an idle machine; see BENCH
	$(BIN)/sdinpaint bench all $(BENCH)

lint: $(VENV)/dev.stamp ## Check style, types, and which package may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

train: $(VENV)/dev.stamp ## Train the demo checkpoint again into out/training; hours, and it can be stopped and resumed
	$(BIN)/python -m sdinpaint.training --out out/training

clean: ## Remove .venv, caches and builds; out/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is older than what it depends on exactly when something must be installed again.
$(VENV)/core.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "sdinpaint needs Python 3.11 to 3.13, and '$(PYTHON)' is not one. Try: make PYTHON=python3.12" >&2; exit 1; }
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
