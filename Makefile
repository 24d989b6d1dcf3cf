# Two commands matter: `make run` and `make test`. Both make .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8080
ADMIN_PORT ?= 9464
# Most tests wait more than they compute: on two cores four at a time take a third of the time.
SIDE_BY_SIDE := -n 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help run test test-all test-hostile test-faults check bench bench-check fmt clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

run: $(VENV)/run.stamp ## start Headrace on 127.0.0.1:8080 (PORT=, ADMIN_PORT=, CONFIG= change that)
	@exec $(BIN)/headrace serve $(if $(CONFIG),-c $(CONFIG)) $(if $(filter command line environment,$(origin PORT)),--listen 127.0.0.1:$(PORT)) $(if $(filter command line environment,$(origin ADMIN_PORT)),--admin 127.0.0.1:$(ADMIN_PORT))

test: $(VENV)/test.stamp ## the whole suite, against real parts
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not alone"
	$(BIN)/python -m pytest -m "not slow and alone"

test-all: $(VENV)/test.stamp ## the suite with its long tables, matrices and soaks
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not alone"
	$(BIN)/python -m pytest -m alone

test-hostile: $(VENV)/test.stamp ## every bad input, as a table: what is promised, what proves it
	$(BIN)/python -m tests.kit.tables hostile

test-faults: $(VENV)/test.stamp ## every fault, as a table
	$(BIN)/python -m tests.kit.tables faults

check: $(VENV)/test.stamp ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict proxy

bench: $(VENV)/test.stamp ## Headrace beside nginx with the same work, twenty minutes (BENCH="--quick", "--all", see bench -h)
	@$(BIN)/python -m bench $(BENCH)

bench-check: $(VENV)/test.stamp ## fails if Headrace lost 15 % against nginx since the committed baseline (BENCH="--quick --print-only")
	@$(BIN)/python -m bench.check $(BENCH)

fmt: $(VENV)/test.stamp ## format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the other targets made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "headrace: Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "headrace: no venv module: apt-get install python3-venv"; exit 1; }

$(VENV)/run.stamp: setup.cfg pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/test.stamp: setup.cfg pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,check,redis]'
	@touch $@ $(VENV)/run.stamp
