# Every target but help and clean first makes the environment ready: as root on a stock Debian or
# Ubuntu nothing else has to be installed by hand. ARGS goes to the command: make test ARGS="-k bitmap".

SHELL := /bin/bash
PYTHON := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup dev demo test bench soak vmtest lint wheel deb clean

help:  ## print this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1	\2/p' Makefile | expand -t 16

setup:  ## install what blktrack needs: system packages, then .venv
	@tools/setup.sh

# What the tests, benchmarks and packages need on top.
dev:
	@tools/setup.sh dev

demo: setup  ## replicate a live file system on a loop disk (root)
	@$(PYTHON) tools/demo.py $(ARGS)

test: dev  ## run the tests; those that need more than this machine has are skipped
	@$(PYTHON) -m pytest $(ARGS)

bench: dev  ## print the benchmark table (root)
	@$(PYTHON) tools/bench.py $(ARGS)

soak: dev  ## run the tests that take long (root)
	@$(PYTHON) -m pytest -m soak --timeout=3600 $(ARGS)

vmtest: dev  ## run the tests inside virtual machines, on every kernel (root)
	@$(PYTHON) -m pytest -m vm $(ARGS) tests/vm

lint: dev  ## check style, format and types
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy

wheel: dev  ## build dist/blktrack-VERSION-py3-none-any.whl
	@$(PYTHON) -m hatchling build --target wheel --directory dist

deb: dev  ## build dist/blktrack_VERSION_all.deb
	@tools/deb.sh

clean:  ## remove .venv, caches and build output
	@rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find blktrack tests tools -name __pycache__ -prune -exec rm -rf {} +
