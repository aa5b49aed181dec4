# make quickstart   installs into .venv, trains a small model and its from-scratch baseline, compares them
# make test         installs what the tests need too; ruff, mypy, pytest
PYTHON ?= python3
BIN := .venv/bin
# Two ranks on a CPU; on GPUs one for each.
RANKS := $(if $(wildcard /dev/nvidia0 /dev/kfd),,--nproc-per-node 2)

.PHONY: quickstart test check clean

quickstart: .venv/quickstart.stamp
	$(BIN)/fleetune run recipes/quickstart.yaml $(RANKS) --baseline --fresh

test: check
	$(BIN)/pytest -m "not alone and not cluster" -n 2 --dist loadfile
	$(BIN)/pytest -m cluster -n 2 --dist loadfile
	$(BIN)/pytest -m alone

check: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Fleetune needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }

.venv/quickstart.stamp: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[quickstart]'
	@touch $@

.venv/test.stamp: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[quickstart,benchmarks,dev]'
	@touch $@ .venv/quickstart.stamp

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
