# Everything a newcomer or a maintainer runs. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := results/digits-double-descent

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install quickstart twins test test-slow test-browser test-gpu test-cluster faults check bench figures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make .venv and install the package in it (PYTHON=python3.12 chooses the interpreter)

$(INSTALLED): pyproject.toml
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "There is no '$(PYTHON)'. Install Python 3.11 or newer, or run: make install PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "flatmin-sweep needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." >&2; \
	  echo "If a newer one is installed, run: make install PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments." >&2; \
	  echo "On Debian and Ubuntu, run: sudo apt install python3-venv" >&2; exit 1; }
	@test -f src/flatmin/optimizers/__init__.py || { \
	  echo "src/flatmin/optimizers is not a link to a folder: get the repository with git, with links enabled" >&2; \
	  echo "(on Windows: git config core.symlinks true, then git checkout -- src)." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

quickstart: install ## run a small study on bundled data and make its report
	$(BIN)/flatmin-sweep launch digits-double-descent --results $(QUICKSTART)
	$(BIN)/flatmin-sweep report --results $(QUICKSTART) -o $(QUICKSTART)/report.html
	@echo
	@echo "The report is one file that opens without a network:"
	@$(BIN)/python -c 'import pathlib; print("  " + pathlib.Path("$(QUICKSTART)/report.html").resolve().as_uri())'
	@echo "Look first at the test error against the width, the number of hidden units, at 20 % label noise:"
	@echo "does it fall, rise again where the network begins to fit every noisy label, and fall once more?"
	@echo "Then at the rank correlations: which sharpness measure follows the generalisation gap, and which only the width?"

twins: install ## run the small twin of every built-in study end to end, and say how long each took
	$(BIN)/python -m pytest -q tests/orchestrator/test_twins.py

test: install ## run the tests, as CI does (not slow, no GPU, no browser, no cluster)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile -m "not slow and not gpu and not browser and not cluster"

test-slow: install ## run the full studies and all else over a minute
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster"

test-browser: install ## drive a report in headless Chromium (on Debian: sudo apt install chromium)
	$(BIN)/python -m pytest -m browser

test-gpu: install ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-cluster: install ## start a Ray cluster over SSH on this machine (root; on Debian: apt install openssh-server rsync)
	$(BIN)/python -m pytest -m cluster

faults: install ## inject every fault there is (kills, hangs, full disks...), and print what became of the models; as root
	$(BIN)/python -m pytest tests/faults

check: install ## ruff, mypy, then the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory test

bench: install ## run every benchmark
	@set -e; for file in benchmarks/[!_]*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

figures: install ## write docs/figures.md from what benchmarks have found
	$(BIN)/python benchmarks/_figures.py

clean: ## remove .venv, builds and caches; results stay
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
