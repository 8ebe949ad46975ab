# `make demo` and `make test` work on a fresh clone: the first target that runs makes .venv with the versions of
# constraints.txt, later ones reuse it. PYTHON=... chooses the interpreter, ARGS=... goes to the program that runs.

PYTHON ?=
ARGS ?=
REGRESSION_ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
GPU_COMPILER := $(VENV)/gpu-compiler
SUITABLE := -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))'
CANDIDATES := $(or $(PYTHON),python3.12 python3.13 python3.14 python3 python \
	$(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3))

# libtpu is there for its compiler alone; JAX would look for TPUs, and complain.
export JAX_PLATFORMS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda,cpu || echo cpu)

.PHONY: demo test test-full lint bench bench-suite bench-cpu bench-gpu baseline set-up
.DELETE_ON_ERROR:

# A day of a production chat service, replayed through paged attention.
demo: $(INSTALLED)
	$(BIN)/python -m bench.serving $(ARGS)

# The values first: without a GPU the kernels run in Triton's interpreter. Then the same kernels compiled for real GPUs.
# XLA compiles thousands of small programs, each to run once: at level 0 the values take about half as long.
test: $(INSTALLED)
	TRITON_INTERPRET=1 XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" \
	    $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not compile" $(ARGS)
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m compile \
	    tests/test_compile_gpu.py tests/test_compile_hopper.py tests/test_compile_attention.py tests/test_compile_cache.py \
	    tests/test_compile_xla.py tests/test_static_baseline.py tests/test_explain.py tests/test_launch.py
	$(MAKE) bench-cpu

# Every case in every dtype, and hundreds of drawn problems for each operation: hours.
test-full: export HYPOTHESIS_PROFILE = full
test-full: override ARGS += -o faulthandler_timeout=0
test-full: test

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Stores what the kernels compile to, after a change that is meant.
baseline: $(INSTALLED)
	$(BIN)/python -m bench.static --write

bench: $(INSTALLED)
	$(BIN)/python -m bench.decode $(ARGS)

# What pytest-benchmark is asked for goes into ARGS.
bench-suite: $(INSTALLED)
	$(BIN)/python -m pytest -o python_files='bench_*.py' -p no:xdist $(ARGS) bench

# The suites, as ratios beside those of bench/baselines; --write stores what was found.
bench-cpu: $(INSTALLED)
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.regression --run $(REGRESSION_ARGS)

bench-gpu: $(INSTALLED)
	$(BIN)/python -m bench.regression --run $(REGRESSION_ARGS)

set-up: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.cfg constraints.txt
	@if ! $(BIN)/python $(SUITABLE) 2>/dev/null; then \
	    found=; \
	    for candidate in $(CANDIDATES); do \
	        if "$$candidate" $(SUITABLE) 2>/dev/null; then found=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "No Python >= 3.12 with its venv module was found; tried: $(CANDIDATES)." >&2; \
	        echo "Install one (Debian: python3.12 and python3.12-venv; or pyenv, uv, conda) or say where it is:" \
	            "make PYTHON=/path/to/python3.12 ..." >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$found (once; it downloads a few hundred MB)"; \
	    "$$found" -m venv --clear $(VENV); \
	fi
	@extras=dev; \
	if nvidia-smi -L >/dev/null 2>&1; then extras=dev,cuda; fi; \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools && \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[$$extras]"
# With this plugin JAX lowers Triton kernels for CUDA, on a CPU too; without its dependencies, the CUDA libraries, it is small.
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	    $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps jax-cuda13-plugin; \
	fi
# XLA's compiler for GPUs, which needs none. It lies apart, where tests find it and JAX does not: that would look for a GPU
# in every process and complain. Into such a folder pip installs anew whatever is there, so it is asked for that first.
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! $(BIN)/python -m pip show --quiet jax-cuda13-pjrt 2>/dev/null && \
	    ! $(BIN)/python -m pip freeze --path $(GPU_COMPILER) | grep -qxFf constraints.txt; then \
	    rm -rf $(GPU_COMPILER) && $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps \
	        --target $(GPU_COMPILER) jax-cuda13-pjrt; \
	fi
	@touch $@
