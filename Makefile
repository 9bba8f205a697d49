# Needs Python 3.11 or later, git and make. Everything is installed into .venv and nowhere else.

PYTHON ?= python3
PARALLEL ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed
ON_15 := $(foreach each,postgres_* blocking_* enlist* engines disturbances session* coordinator \
	gate_on_servers,$(wildcard tests/integration/test_$(each).py))

.DEFAULT_GOAL := help
.PHONY: help setup test quick demo bench exhaustive simulate crash torture powercuts check clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## create .venv and install everything that development needs

# Runs again only when pyproject.toml has changed. uv is used where it is there, since it is faster.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Syncpoint needs Python 3.11 or later, but $(PYTHON) is" \
	        "$$($(PYTHON) --version 2>/dev/null || echo 'not there')." \
	        "Name another one: make $(or $(firstword $(MAKECMDGOALS)),setup) PYTHON=python3.12" >&2; \
	    exit 1; }
	@echo "Installing into .venv: the first time this takes a minute"
	@if command -v uv >/dev/null; then \
	    { test -x $(BIN)/python || uv venv --quiet --python "$(PYTHON)" .venv; } && \
	    uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else \
	    { test -x $(BIN)/python || "$(PYTHON)" -m venv .venv; } && \
	    { $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; } && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@

test: setup  ## run all tests, what touches PostgreSQL on 15 and 18; the last line is the summary
	@echo "What people do with PostgreSQL, on 15"
	@SYNCPOINT_TEST_POSTGRESQL=15 $(BIN)/python -m pytest -q -n $(PARALLEL) --dist loadfile $(ON_15)
	@echo "Everything, on 18"
	@$(BIN)/python -m pytest -q -n $(PARALLEL) --dist loadfile

quick: setup  ## run the tests that need no server, in seconds
	@$(BIN)/python -m pytest -q tests/unit tests/protocol

demo: setup  ## watch a crash between two commits, and the recovery
	@$(BIN)/syncpoint demo

bench: setup  ## measure against the hand-written loop on the same servers
	@$(BIN)/syncpoint bench

exhaustive: setup  ## search every state of the real core within larger bounds
	@$(BIN)/python -m tests.exhaustive

simulate: setup  ## SEED=7 replays one simulated history, SEEDS=1000 runs that many
	@$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),1000))

crash: setup  ## meet every fault at every effect boundary on real servers
	@$(BIN)/python -m tests.crash --all

torture: setup  ## MINUTES=3 SEED=7: real processes and servers, killed, paused, cut off
	@$(BIN)/python -m tests.torture --minutes $(or $(MINUTES),3) $(if $(SEED),--seed $(SEED))

powercuts: setup  ## CUTS=30: the log's disk loses power; needs root and loop devices
	@$(BIN)/python -m tests.torture.power --cuts $(or $(CUTS),30)

check: setup  ## lint, format, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean:  ## remove .venv and every cache
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
