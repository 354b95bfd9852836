PYTHON ?= python3
FULL := .venv/bin
BASE := .venv-base/bin
BENCH := .venv-bench/bin
# Processes that share the test files.
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist loadfile

.PHONY: help demo test test-base test-array-api test-big test-gpu gate floor check bench bench-quick bench-gpu gpu-report bench-scale clean

help:            ## what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 14

demo: $(BASE)/.installed-demo            ## segment a photograph; writes segmentation.png (base install, no torch)
	$(BASE)/python examples/segmentation.py

test: $(FULL)/.installed-test            ## the test suite with every backend that a CPU can run
	GAUSSMIX_REQUIRE_BACKENDS=torch,triton,lightning_fabric,dask,jax,numba,array_api_strict $(FULL)/python $(PYTEST) -m "not big" $(ARGS)

test-base: $(BASE)/.installed-test-base            ## the same suite where torch is not installed
	GAUSSMIX_REQUIRE_BACKENDS=array_api_strict $(BASE)/python $(PYTEST) -m "not big" $(ARGS)

test-array-api: $(FULL)/.installed-test            ## the same suite with the array API implementation for every array
	GAUSSMIX_BACKEND=array_api $(FULL)/python $(PYTEST) -m "not big" --ignore=tests/kernels $(ARGS)

test-big: $(FULL)/.installed-test            ## cases that need several GiB of memory or some minutes
	$(FULL)/python -m pytest -m big $(ARGS)

test-gpu:            ## the kernels' tests with the Python that is active, on the GPU it sees
	$(PYTHON) -m pytest tests/kernels $(ARGS)

gate: $(FULL)/.installed-test            ## compiles every kernel for four GPU architectures; needs no GPU
	PYTHONPATH=kernels $(FULL)/python -m gaussmix_kernels.gate

floor: $(FULL)/.installed-test            ## what compiled kernels take at least on four GPUs; needs none
	PYTHONPATH=src:kernels $(FULL)/python benchmarks/floor.py $(ARGS)

check: $(FULL)/.installed-test            ## formatting, lint, types and the direction of imports
	$(FULL)/ruff format --check .
	$(FULL)/ruff check .
	$(FULL)/mypy
	PYTHONPATH=src:kernels $(FULL)/lint-imports

bench: $(BENCH)/.installed-bench            ## every benchmark against scikit-learn, oneDAL, torchgmm and tgmm, some hours; rewrites the snapshot
	$(BENCH)/python benchmarks/run.py --output benchmarks/snapshots/cpu.json $(ARGS)

bench-quick: $(FULL)/.installed-test            ## small cases, compared with the committed snapshot
	$(FULL)/python benchmarks/run.py --quick

bench-gpu:            ## the kernels, EM and its peers on the GPU that the active Python sees; under 8 minutes
	PYTHONPATH=src:kernels $(PYTHON) benchmarks/gpu.py $(ARGS)

gpu-report:            ## tests, benchmark, profiler and sanitizer on the GPU that the active Python sees; under 9 minutes
	$(PYTHON) benchmarks/gpu_report.py $(ARGS)

bench-scale: $(FULL)/.installed-test            ## fits of a file of 26 GB, in processes and killed ones; half an hour; rewrites its snapshot
	$(FULL)/python benchmarks/scale.py --output benchmarks/snapshots/scale-cpu.json $(ARGS)

clean:            ## remove environments and caches
	rm -rf .venv .venv-base .venv-bench .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(FULL)/.installed-%: pyproject.toml constraints.txt
	test -x $(FULL)/python || $(PYTHON) -m venv .venv
	$(FULL)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

$(BENCH)/.installed-%: pyproject.toml constraints.txt
	test -x $(BENCH)/python || $(PYTHON) -m venv .venv-bench
	$(BENCH)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

$(BASE)/.installed-%: pyproject.toml
	test -x $(BASE)/python || $(PYTHON) -m venv .venv-base
	$(BASE)/python -m pip install --quiet -e '.[$*]'
	touch $@
