PYTHON ?= python3
FULL := .venv/bin
BASE := .venv-base/bin

.PHONY: help demo test test-base test-big check clean

help:            ## what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 14

demo: $(BASE)/.installed-demo            ## segment a photograph; writes segmentation.png (base install, no torch)
	$(BASE)/python examples/segmentation.py

test: $(FULL)/.installed-test            ## the test suite with every backend that a CPU can run
	GAUSSMIX_REQUIRE_BACKENDS=torch,array_api_strict $(FULL)/python -m pytest -m "not big" $(ARGS)

test-base: $(BASE)/.installed-test-base            ## the same suite where torch is not installed
	GAUSSMIX_REQUIRE_BACKENDS=array_api_strict $(BASE)/python -m pytest -m "not big" $(ARGS)

test-big: $(FULL)/.installed-test            ## cases that need several GiB of memory or some minutes
	$(FULL)/python -m pytest -m big $(ARGS)

check: $(FULL)/.installed-test            ## formatting, lint, types and the direction of imports
	$(FULL)/ruff format --check .
	$(FULL)/ruff check .
	$(FULL)/mypy
	PYTHONPATH=src:kernels $(FULL)/lint-imports

clean:            ## remove environments and caches
	rm -rf .venv .venv-base .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(FULL)/.installed-%: pyproject.toml constraints.txt
	test -x $(FULL)/python || $(PYTHON) -m venv .venv
	$(FULL)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

$(BASE)/.installed-%: pyproject.toml
	test -x $(BASE)/python || $(PYTHON) -m venv .venv-base
	$(BASE)/python -m pip install --quiet -e '.[$*]'
	touch $@
