# Each target sets itself up: a virtual environment in .venv, made once and reused until pyproject.toml or the
# constraints change.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
LEROBOT := .venv-lerobot
REFERENCE := .venv-reference
SETUP := pyproject.toml constraints/main.txt tools/setup.sh tools/find_python.sh
RUN ?=
TESTS ?= tests
# Many tests wait for other processes, so one worker more than there are cores; a single file stays in one process.
WORKERS ?= $(shell echo $$(( $$(nproc) < 7 ? $$(nproc) + 1 : 8 )))
PARALLEL = $(if $(filter tests,$(TESTS)),-n $(WORKERS) --max-worker-restart=0 --dist loadfile --no-loadscope-reorder)

.PHONY: help demo test test-full test-reference test-lerobot lerobot bench lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

demo: $(VENV)/.ready-demo  ## train a simulated fleet from a few demonstrations, watch it, get a report
	@exec $(VENV)/bin/fleet demo $(RUN)

test: lint  ## lint, types and every test at small counts
	@echo "tests (FLEET_TEST_SCALE=1)"
	FLEET_TEST_SCALE=1 $(PY) -m pytest -q $(PARALLEL) --durations=15 $(TESTS)

test-full: lint  ## the same at the counts that the claims state, and test-reference
	@echo "tests (FLEET_TEST_SCALE=10)"
	FLEET_TEST_SCALE=10 $(PY) -m pytest -q $(PARALLEL) --durations=30 --timeout=1200 $(TESTS)
	if [ "$(TESTS)" != tests ]; then exit; fi
	if $(MAKE) --no-print-directory $(REFERENCE)/.ready-reference; then
		$(MAKE) --no-print-directory test-reference
	else
		echo "test-reference: SKIPPED, losses were not compared with other libraries: $(REFERENCE) could not be made (above)"
	fi

test-reference: $(REFERENCE)/.ready-reference  ## losses and gradients against d3rlpy, torchrl, rlax and stable-baselines3
	@echo "tests against other libraries"
	FLEET_REFERENCE=all $(REFERENCE)/bin/python -m pytest -q --durations=5 tests/reference

lerobot: $(LEROBOT)/.ready-lerobot  ## an environment with lerobot, for its policies, and fleet data import and export (Python 3.12 or newer)
	@echo "use $(LEROBOT)/bin/fleet data import | export"

test-lerobot: $(LEROBOT)/.ready-lerobot  ## policies, import and export tried with lerobot itself (Python 3.12 or newer)
	@echo "tests with lerobot"
	$(LEROBOT)/bin/python -m pytest -q --durations=5 -n $(WORKERS) --max-worker-restart=0 --dist loadfile tests/lerobot

bench: $(VENV)/.ready-dev  ## every benchmark, and benchmarks/RESULTS.md from their results
	@tools/setup_peers.sh || echo "bench  without these peers: their rows will say so"
	@for name in attribution buffer learner policies learning; do
		echo "bench  $$name"
		$(PY) -m benchmarks.$$name --json
	done

lint: $(VENV)/.ready-dev  ## ruff and mypy
	@echo "lint"
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --check --quiet . || { echo "files above are not formatted: $(VENV)/bin/ruff format ." >&2; exit 1; }
	$(VENV)/bin/mypy fleet algorithms buffer actors learner infra

$(VENV)/.ready-demo: $(SETUP)
	@tools/setup.sh $(VENV) demo learner,sim

$(VENV)/.ready-dev: $(SETUP)
	@tools/setup.sh $(VENV) dev learner,sim,language,dev

$(LEROBOT)/.ready-lerobot: pyproject.toml constraints/lerobot.txt tools/setup.sh tools/find_python.sh
	@LEAST_PYTHON=3.12 CONSTRAINTS=constraints/lerobot.txt tools/setup.sh $(LEROBOT) lerobot lerobot,dev

$(REFERENCE)/.ready-reference: pyproject.toml constraints/reference.txt tools/setup.sh tools/find_python.sh
	@CONSTRAINTS=constraints/reference.txt tools/setup.sh $(REFERENCE) reference actor,reference,dev

clean:  ## remove environments, caches and build output; runs/ stays
	rm -rf .venv .venv-base310 .venv-base311 .venv-lerobot .venv-reference .venv-reverb .venv-torchrl build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
