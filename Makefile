# make bench   the headline benchmark, about 2 minutes      make test   the suite, but what is slow
# make test-all   the whole suite
# make lint    ruff and clang-format, checks only           make asan   CPU tests under ASan and UBSan
# make cuda    compile the CUDA half (needs nvcc, no GPU)   make clean  remove what was built
# make gpu-audit   compile every GPU kernel for three architectures; a table of what each needs (no GPU)
# make gpu-check   on a machine with a GPU and nvcc: build for it, test and measure, in under 10 minutes
#
# Without PYTHON these make .venv, install requirements.txt into it (once) and build in place. With
# PYTHON=/path/to/python, an interpreter that has torch, nothing is downloaded or installed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: bench test test-all lint asan cuda gpu-audit gpu-check clean build FORCE

ifdef PYTHON
PY := $(shell command -v "$(PYTHON)" || echo "$(PYTHON)")
READY := build/.checked-$(firstword $(shell echo "$(PY)" | cksum))
else
PY := $(CURDIR)/.venv/bin/python
READY := .venv/.installed
endif

# The interpreter's own ninja, ruff and clang-format go before the system's.
export PATH := $(patsubst %/,%,$(dir $(PY))):$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

SOURCES := setup.py $(shell find csrc -type f)
BUILT := build/.built-$(firstword $(shell echo "$(PY)" | cksum))
# --force: setuptools compares only the sources listed; ninja knows the headers too and redoes no more.
BUILD_EXT := $(PY) setup.py -q build_ext --force

ARGS ?=

bench: build
	$(PY) -m benchmarks headline --out benchmarks/out $(ARGS)

# As many processes as there are processors, each on one thread. ARGS replaces all of it: a file, -k, -m, -x.
# Tests that are marked slow (wide sweeps, whole runs of tools) are in test-all alone.
PROCESSES ?= $(shell nproc)
SPREAD = $(if $(shell $(PY) -c 'import xdist' 2>&1),,-n $(PROCESSES) --dist loadfile --no-loadscope-reorder)
LEFT_OUT := -m "not slow"
test-all: LEFT_OUT :=
test test-all: build
	@$(PY) -c 'import pytest, hypothesis' || { echo "make $@ needs pytest and hypothesis in $(PY)"; exit 1; }
	$(PY) -m pytest $(or $(ARGS),$(SPREAD) $(LEFT_OUT))

lint: $(READY)
	@failed=0; \
	$(PY) -m ruff check . || failed=1; \
	$(PY) -m ruff format --check . || failed=1; \
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs clang-format --dry-run -Werror || failed=1; \
	exit $$failed

build: $(BUILT)

# Also built again where the binary itself was removed.
$(BUILT): $(READY) $(SOURCES) $(if $(wildcard dynops/_C*.so),,FORCE)
	@mkdir -p build
	$(BUILD_EXT) --inplace
	@touch $@

.venv/.installed: requirements.txt .ci/setup
	.ci/setup

build/.checked-%:
	@$(PY) -c 'import torch' || { echo "PYTHON=$(PYTHON): expected an interpreter that has torch"; exit 1; }
	@mkdir -p build && touch $@

# A copy of the package is built with sanitizers and tested by itself; dynops/ keeps the fast binary.
# libstdc++ is preloaded too: ASan must find __cxa_throw before Python loads any C++.
ASAN := $(CURDIR)/build/asan
ASAN_TESTS ?= tests/plans/test_plans.py tests/ops/test_samples.py tests/ops/test_blocks.py tests/ops/test_pixels.py tests/ops/test_pixels_properties.py tests/plans/test_channel_plans.py tests/ops/test_channels.py tests/ops/test_channels_attacks.py tests/ops/test_channel_weights.py tests/ops/test_channel_outputs.py tests/ops/test_channel_filters.py tests/nn/test_channels.py tests/plans/test_expert_plans.py tests/ops/test_experts.py tests/ops/test_experts_attacks.py tests/contracts/test_robustness.py -k "not reference and not compile and not export and not fork"
LIB = $$("$${CXX:-g++}" -print-file-name=$(1))
asan: $(READY)
	rm -rf $(ASAN)/run && mkdir -p $(ASAN)/run
	cp -r dynops csrc tests benchmarks pyproject.toml setup.py README.md $(ASAN)/run && rm -f $(ASAN)/run/dynops/_C*.so
	DYNOPS_SANITIZE=1 $(BUILD_EXT) --build-lib $(ASAN)/run --build-temp $(ASAN)/tmp
	cd $(ASAN)/run && PYTHONPATH=$(ASAN)/run PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
	LD_PRELOAD="$(call LIB,libasan.so) $(call LIB,libubsan.so) $(call LIB,libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(PY) -m pytest --capture=sys -q $(ASAN_TESTS)

# Into its own folder: that nvcc accepts the sources, for TORCH_CUDA_ARCH_LIST, is all that is wanted.
cuda: $(READY)
	FORCE_CUDA=1 $(BUILD_EXT) --build-lib build/cuda/lib --build-temp build/cuda/tmp

# Fails where a kernel spills, lacks tensor cores, or needs more than an SM has. ARGS: --arch 90, --kernel NAME, --out DIR.
gpu-audit: build
	$(PY) -m benchmarks.gpu audit $(ARGS)

# PYTHON, else .venv where there is one, else python3: nothing is made, downloaded or installed.
GPU_PY = $(if $(PYTHON),$(PY),$(or $(wildcard $(CURDIR)/.venv/bin/python),python3))
gpu-check:
	$(GPU_PY) -m benchmarks.gpu check $(ARGS)

clean:
	rm -rf build dist dynops.egg-info dynops/_C*.so benchmarks/out .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
