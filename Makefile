# make demo            everything from nothing: environment, front end, the whole graph; then the feature browser and Dagster's UI
# make demo SERVE=0    the same, and stop after the build
# make run CONFIG=my.yaml    the same road with your own model and text
# make test            the test suite
# make faults          kill, starve and corrupt a small pipeline in every stage, and see that nothing is lost; follow the runbook; try the variants that make test leaves out: minutes
# make check           linters, types, import rules, stale documents: under a minute, and without a network
# make audit           known vulnerabilities of the pinned packages, of which the registry is asked one by one: before a release, not in each run
# make bench           every benchmark at its small size; make bench-shuffle runs one at full size, make bench-shuffle QUICK=1 at its small one
# make docs            write the generated parts of the documents
# make notebooks       run the notebooks of examples/ and write what they show; the one about a pipeline's data if make demo has been run
# make dev             Dagster's UI on the demo pipeline, without running anything
#
# Options: PYTHON=python3.12  VENV=.venv  SERVE=0  CONFIG=file.yaml  PIP_ARGS="..." (to every pip install)  PYTEST_ARGS="..."  QUICK=1  BENCH_ARGS="..."

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?=
SERVE ?= 1
CONFIG ?=
PIP_ARGS ?=
PYTEST_ARGS ?= -n 3 --dist worksteal
TORCH := torch==2.13.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ENV_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# In a terminal pip shows what it does and its bars; into a file or a pipe it says nothing but errors, and each stage is one line of ours.
PIP_INSTALL = $(PIP) install $$quiet $(PIP_ARGS) -c constraints.txt
STARTED = quiet=; [ -t 1 ] || quiet=-q; started=$$(date +%s)
DONE = echo "    done in $$(( $$(date +%s) - started )) s"
SOURCES := interp_assets resources tests benchmarks examples frontend/build.py hatch_build.py
export INTERP_SKIP_FRONTEND

.DEFAULT_GOAL := help
.PHONY: help env dev-env frontend demo run test faults check audit bench docs notebooks dev clean

help:
	@sed -n '/^# /s/^# //p' Makefile

# --- environment -----------------------------------------------------------------------------------------------------------------------

# Looks for a Python that the pinned packages support, and says what to do when there is none.
$(BIN)/python:
	@set -e; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "interp-assets needs Python 3.11, 3.12 or 3.13, and found: $$(python3 --version 2>&1 || echo no python3)." >&2; \
	  echo "Install one (Debian: apt install python3 python3-venv; macOS: brew install python@3.13), or name it: make demo PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$found has no venv module. Debian: apt install python3-venv" >&2; exit 1; \
	fi; \
	echo "Making the virtual environment $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV)

# PyTorch first and alone: it is the one big download, and its wheel differs from machine to machine.
$(ENV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes minutes, most of them for downloads that pip keeps for the next time"
	@echo "[1/2] PyTorch: $(TORCH), the one big download"
	@$(STARTED); $(PIP_INSTALL) "$(TORCH)" && $(DONE)
	@echo "[2/2] interp-assets and the packages that it stands on, Dagster and transformers among them"
	@$(STARTED); INTERP_SKIP_FRONTEND=1 $(PIP_INSTALL) -e . && $(DONE)
	@touch $@
	@echo "Installed: $$($(BIN)/interp --version). Use it as $(BIN)/interp, or as interp after: source $(BIN)/activate"

$(DEV_STAMP): $(ENV_STAMP)
	@echo "Installing what development needs besides: test tools, linters, the tools that we compare with"
	@$(STARTED); INTERP_SKIP_FRONTEND=1 $(PIP_INSTALL) -e ".[dev]" && $(DONE)
	@touch $@

env: $(ENV_STAMP)

dev-env: $(DEV_STAMP)

# Knows by itself whether the sources have changed. Without Node in reach the pages cannot be built, and all the rest still works.
frontend: $(ENV_STAMP)
	@$(BIN)/python frontend/build.py || echo "Going on without the feature browser's pages; the records and Dagster's UI do not need them." >&2

# --- the road --------------------------------------------------------------------------------------------------------------------------

demo: $(ENV_STAMP) frontend
	@$(BIN)/interp demo $(if $(filter 0,$(SERVE)),--no-serve)

run: $(ENV_STAMP) frontend
	@$(BIN)/interp run --config "$(CONFIG)"

dev: $(ENV_STAMP)
	@$(BIN)/interp dev $(if $(CONFIG),--config "$(CONFIG)")

# --- gates -----------------------------------------------------------------------------------------------------------------------------

test: $(DEV_STAMP) frontend
	$(BIN)/python -m pytest $(PYTEST_ARGS)

faults: $(DEV_STAMP)
	$(BIN)/python -m pytest -m faults -n 0 --durations=0 --durations-min=5

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright -p . --pythonpath $(BIN)/python
	$(BIN)/python docs/build.py --check
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_layering.py

# Where the registry has no advisories, nothing can be audited, and that is no failure.
audit: $(DEV_STAMP)
	@out=$$($(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip --progress-spinner off 2>&1); status=$$?; \
	echo "$$out" | grep -v "WARNING\|could not be audited\|^---\|^Name .*Skip" ; \
	if [ $$status != 0 ] && echo "$$out" | grep -q "Found .* known vulnerabilit"; then exit 1; fi

bench: $(DEV_STAMP)
	@for file in benchmarks/bench_*.py; do echo "# $$file" >&2; $(BIN)/python "$$file" --quick || exit 1; done

bench-%: $(DEV_STAMP)
	@$(BIN)/python benchmarks/bench_$*.py $(if $(QUICK),--quick) $(BENCH_ARGS)

docs: $(DEV_STAMP)
	$(BIN)/python docs/build.py

notebooks: $(DEV_STAMP)
	$(BIN)/python docs/notebooks.py $(if $(wildcard data/pystdlib/6-web),--pipeline data/pystdlib)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
