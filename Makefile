# Everything is installed into .venv with pinned versions; only Python 3.11 or later, pip
# and make are required.

PYTHON ?= python3
# Most tests wait for other processes, so more of them than cores run at once.
PYTEST_ARGS ?= -n $(shell $(PYTHON) -c 'import os; print(max(4, os.cpu_count() or 1))') --dist worksteal
BENCH_ARGS ?=
BENCH_OUT ?= build

BIN := .venv/bin
READY := .venv/.ready
BENCH_FILES = --json $(BENCH_OUT)/bench.json --svg $(BENCH_OUT)/bench.svg

.PHONY: help demo test bench bench-full lint format clean

help:
	@echo "make demo    send a job to a worker on this machine and watch it"
	@echo "make test    run the linters, then the tests (PYTEST_ARGS=... for pytest)"
	@echo "make bench   measure every route beside other ways to move a file (256 MiB)"
	@echo "make bench-full  the same with 5 GiB, which takes half an hour"
	@echo "                 (BENCH_ARGS=... for bench.compare, BENCH_OUT=DIR)"
	@echo "make lint    run the linters"
	@echo "make format  format the code and apply the safe fixes of the linter"
	@echo "make clean   remove .venv and all caches"

# The stamp is written last: an installation that was interrupted starts over.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "sleap-rtc needs Python 3.11 or later, but $(PYTHON) is " \
	  + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	@echo "== installing into .venv"
	@rm -f $(READY)
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python examples/demo.py

test: lint
	@echo "== pytest"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(READY)
	@mkdir -p $(BENCH_OUT)
	@$(BIN)/python -m bench.compare $(BENCH_FILES) $(BENCH_ARGS)

bench-full: $(READY)
	@mkdir -p $(BENCH_OUT)
	@$(BIN)/python -m bench.compare --size 5GiB --quic-size 128MiB \
	  $(BENCH_FILES) $(BENCH_ARGS)

lint: $(READY)
	@echo "== black"
	@$(BIN)/black --check .
	@echo "== ruff"
	@$(BIN)/ruff check --quiet .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== import contracts"
	@$(BIN)/lint-imports
	@if [ -x $(BIN)/actionlint ]; then \
	  echo "== actionlint" && $(BIN)/actionlint; \
	else \
	  echo "!! actionlint has no wheel here: THE WORKFLOWS WERE NOT CHECKED"; \
	fi
	@if [ -x $(BIN)/hadolint ]; then \
	  echo "== hadolint" && $(BIN)/hadolint Dockerfile; \
	else \
	  echo "!! hadolint has no wheel here: THE DOCKERFILE WAS NOT CHECKED"; \
	fi

format: $(READY)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/black --quiet .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	rm -rf .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
