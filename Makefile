# Two commands matter: `make run` and `make test`. Both make .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8080
ADMIN_PORT ?= 9464
FUZZ_S ?= 60
LOCK := deploy/requirements.lock
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
# Most tests wait more than they compute: on two cores four at a time take a third of the time.
SIDE_BY_SIDE := -n 4 --dist worksteal

# The tests start hundreds of processes. An environment that forbids compiled files (containers set this) would
# have each of them compile the package again: a third of the suite's CPU time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test test-all test-hostile test-faults soak coverage check bench bench-check fuzz sbom lock fmt clean

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

soak: $(VENV)/test.stamp ## ten minutes of mixed load (SOAK_S=60: a minute): fails if memory, descriptors or tasks grow
	@$(BIN)/python -m tests.soak $(or $(SOAK_S),600)

coverage: $(VENV)/test.stamp $(VENV)/coverage.extra ## branch coverage of proxy/; every gap has its reason in tests/coverage_gaps.toml
	@rm -rf .coverage
	@$(BIN)/python -m coverage run -m pytest $(SIDE_BY_SIDE) -m "not slow and not alone"; first=$$?; \
	  $(BIN)/python -m coverage run -m pytest -m "not slow and alone"; second=$$?; \
	  $(BIN)/python -m coverage combine -q && $(BIN)/python -m coverage json -q -o .coverage/report.json && \
	  $(BIN)/python -m tests.kit.gaps .coverage/report.json && exit $$((first + second))

check: $(VENV)/test.stamp ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict proxy

bench: $(VENV)/test.stamp ## Headrace beside nginx with the same work, twenty minutes (BENCH="--quick", "--all", see bench -h)
	@$(BIN)/python -m bench $(BENCH)

bench-check: $(VENV)/test.stamp ## fails if Headrace lost 15 % against nginx since the committed baseline (BENCH="--quick --print-only")
	@$(BIN)/python -m bench.check $(BENCH)

fuzz: $(VENV)/test.stamp $(VENV)/fuzz.extra ## a minute of inputs that nobody would write, for scanner and peek (FUZZ_S=)
	@for target in scanner peek; do mkdir -p .fuzz/$$target && $(BIN)/python -m tests.fuzz.target $$target .fuzz/$$target \
	  -max_total_time=$$(($(FUZZ_S) / 2)) -max_len=256 -artifact_prefix=.fuzz/ -print_final_stats=1 || exit 1; done

sbom: $(VENV)/run.stamp $(VENV)/sbom.extra ## what a server runs, as CycloneDX: headrace.cdx.json
	@$(BIN)/python -m deploy.sbom headrace.cdx.json && echo headrace.cdx.json

lock: $(VENV)/lock.extra ## deploy/requirements.lock anew: the releases that `make run` installs, with their hashes
	@$(BIN)/python -m deploy.lock

fmt: $(VENV)/test.stamp ## format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the other targets made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz .coverage headrace.cdx.json *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "headrace: Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "headrace: no venv module: apt-get install python3-venv"; exit 1; }

# Nothing but what the lock's hashes name, the build's tools too.
$(VENV)/run.stamp: setup.cfg pyproject.toml $(LOCK) | $(VENV)/bin/python
	@$(PIP) --require-hashes -r $(LOCK)
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# On top of what a server runs, so that it is what is tested.
$(VENV)/test.stamp: $(VENV)/run.stamp
	@$(PIP) -e '.[test,check,redis,sbom]'
	@touch $@

$(VENV)/%.extra: setup.cfg | $(VENV)/bin/python
	@$(PIP) -e '.[$*]'
	@touch $@
