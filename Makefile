# Two commands need nothing else: `make finetune` and `make test`. Both set up VENV once.
#   VENV=dir    environment to use; created if it does not exist, otherwise the project is installed into it
#   PYTHON=exe  interpreter (>= 3.11) that creates VENV
#   ARGS=...    further arguments of `chunkft finetune` or pytest
# `make gpu-env` rebuilds the environment of a GPU machine on a CPU, beside VENV:
#   GPU_VENV=dir   where; as VENV
#   PYTHON312=exe  interpreter (3.12) that creates GPU_VENV

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
ARGS ?=

BIN := $(VENV)/bin
# Build directories and stamps carry the place of this checkout: one environment may serve several, one after another.
ID := $(shell pwd -P | cksum | cut -d ' ' -f 1)
RUN_STAMP := $(VENV)/.chunkft-run-$(ID)
TEST_STAMP := $(VENV)/.chunkft-test-$(ID)
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/*.inc csrc/*.cpp)

# Without a constraint, torch brings gigabytes of CUDA libraries to a machine that has no use for them.
GPU := $(shell if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null 2>&1; then echo yes; fi)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(GPU),,-c constraints-cpu.txt)

.PHONY: help
help:
	@echo "make finetune   fine-tune the embedded model; ARGS=\"--model DIR --data FILE\" for your own"
	@echo "make test       lint, types, import layers, documentation site, C++ tests, Python tests"
	@echo "make lint types layers docs core-test core-sanitize pytest   the parts of it"
	@echo "make nsys ncu sanitize-gpu   on a GPU: profiles, a table of the kernels, checks by compute-sanitizer"
	@echo "make gpu-env    Python 3.12 with constraints-gpu.txt in $(GPU_VENV), chunkft built there without network"
	@echo "make gpu-env-test gpu-dry-run gpu-env-check   there, without a GPU: tests; a rehearsal of the first run; a short round of both"
	@echo "make clean      remove build products; make distclean removes $(VENV) and $(GPU_VENV) as well"

.PHONY: finetune
finetune: $(RUN_STAMP)
	$(BIN)/chunkft finetune $(ARGS)

.PHONY: test
test: lint types layers docs core-test core-sanitize pytest

.PHONY: lint
lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(TEST_STAMP)
	$(BIN)/mypy

.PHONY: layers
layers: $(TEST_STAMP)
	$(BIN)/lint-imports

# The notice that is silenced speaks of releases that the pins in pyproject.toml leave out.
.PHONY: docs
docs: $(TEST_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site
	@echo "site/index.html"

# Kernels that randomise more address bits than the thread sanitizer knows of make it give up at the start.
FIXED_ADDRESSES = $(shell setarch -R true 2>/dev/null && echo setarch -R)

# build directory, sanitizers, command that runs ctest
define core_tests
	$(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCHUNKFT_BUILD_PYTHON=OFF -DCHUNKFT_BUILD_TESTS=ON -DCHUNKFT_SANITIZE=$(2) >$(1).log || { cat $(1).log; exit 1; }
	$(BIN)/cmake --build $(1)
	$(3) $(BIN)/ctest --test-dir $(1) --output-on-failure --parallel 2
endef

.PHONY: core-test
core-test: $(TEST_STAMP)
	@mkdir -p build
	$(call core_tests,build/core-$(ID),)

.PHONY: core-sanitize
core-sanitize: $(TEST_STAMP)
	@mkdir -p build
	$(call core_tests,build/core-$(ID)-address,address$(comma)undefined)
	$(call core_tests,build/core-$(ID)-thread,thread,$(FIXED_ADDRESSES))

comma := ,

# One torch thread a worker: the workers already fill the cores.
.PHONY: pytest
pytest: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

# With those of tests/thorough.py, which have cheaper relatives in the rest.
.PHONY: thorough
thorough: export CHUNKFT_THOROUGH := 1
thorough: pytest

.PHONY: setup
setup: $(TEST_STAMP)

# extra, stamp
define install
	@for c in $${CXX:-c++ g++ clang++}; do command -v "$$c" >/dev/null && exit 0; done; \
	echo "error: chunkft needs a C++20 compiler (GCC >= 11, Clang >= 14), but none was found (CXX='$${CXX:-}')." \
		"Install one: Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install" >&2; \
	exit 1
	$(if $(filter pyproject.toml constraints-cpu.txt,$?),$(PIP_INSTALL) torch,@echo "only sources changed: building anew")
	$(PIP_INSTALL) $(if $(filter pyproject.toml constraints-cpu.txt,$?),-e ".$(1)",--no-deps -e .)
	@find "$(VENV)" -maxdepth 1 -name '.chunkft-*' ! -name '*-$(ID)' -delete
	@touch "$(2)"
endef

$(RUN_STAMP): $(SOURCES) constraints-cpu.txt | $(BIN)/python
	$(call install,,$@)

$(TEST_STAMP): $(SOURCES) constraints-cpu.txt | $(BIN)/python
	$(call install,[test],$@)
	@touch "$(RUN_STAMP)"

$(BIN)/python:
	@if [ -e "$(VENV)" ]; then echo "error: VENV=$(VENV) exists but has no bin/python: remove it or name another" >&2; exit 1; fi
	@"$(or $(PYTHON),false)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: chunkft needs Python 3.11 or newer, which was not found (PYTHON='$(PYTHON)')." \
			"Install it: Debian, Ubuntu: apt-get install python3 python3-venv python3-dev; or set PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot create environments. Install its venv module: Debian, Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; exit 1; }

# Profiles and checks on a GPU, by NVIDIA's tools; docs/profiling.md says what to look for in them. No environment is made
# for them: VENV where it exists, or PYTHON, has to find torch, triton and the built package.
PROFILES := build/nsight
PROFILE_PYTHON = $(firstword $(wildcard $(BIN)/python) $(PYTHON))
NCU_METRICS ?= $(shell $(PROFILE_PYTHON) -m bench.ncu_table --metrics)

# tool, where it comes from
define needs_gpu_and
	@command -v $(1) >/dev/null || { echo "error: $(1) is not on PATH: it comes with $(2)" >&2; exit 1; }
	@$(PROFILE_PYTHON) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null || { \
		echo "error: $(PROFILE_PYTHON) has no torch that sees a GPU: $(1) watches what runs on one" >&2; exit 1; }
	@mkdir -p $(PROFILES)
endef

# A sweep to warm up and one more, state paged between host and GPU, with the ranges of chunkft.tracing.
.PHONY: nsys
nsys:
	$(call needs_gpu_and,nsys,NVIDIA Nsight Systems or the CUDA toolkit)
	CHUNKFT_TRACE=1 nsys profile --trace=cuda,nvtx,osrt --cuda-memory-usage=true --sample=none --cpuctxsw=none \
		--force-overwrite=true --output=$(PROFILES)/steps \
		$(PROFILE_PYTHON) -m bench.residency --only paged --chunks 8 --interval 2 --warmup 16 --steps 16 \
		--out $(PROFILES)/steps.json $(ARGS)
	nsys stats --force-export=true --report nvtx_pushpop_sum --report cuda_gpu_kern_sum \
		--report cuda_gpu_mem_time_sum $(PROFILES)/steps.nsys-rep

# Clocks stay as they are: whoever shares the machine would notice, and what runs at a locked clock is no measurement.
.PHONY: ncu
ncu:
	$(call needs_gpu_and,ncu,NVIDIA Nsight Compute or the CUDA toolkit)
	@rm -f $(PROFILES)/kernels.*
	ncu --nvtx --nvtx-include "regex:ncu .*/" --section WarpStateStats --metrics $(NCU_METRICS) \
		--clock-control none --cache-control all --target-processes all --force-overwrite \
		--export $(PROFILES)/kernels $(PROFILE_PYTHON) -m bench.ncu_targets $(ARGS)
	LC_ALL=C ncu --import $(PROFILES)/kernels.ncu-rep --csv --page raw --print-units base >$(PROFILES)/kernels.csv
	$(PROFILE_PYTHON) -m bench.ncu_table $(PROFILES)/kernels.csv --json $(PROFILES)/kernels.json

# tool of compute-sanitizer; memory is taken from the driver piece by piece, or a neighbour would hide what lies outside
define sanitized
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(1) --report-api-errors no --error-exitcode 1 \
		$(PROFILE_PYTHON) -m bench.ncu_targets --small --forms slice misaligned group \
		--only wgrad adamw-triton embedding-triton $(ARGS)
endef

.PHONY: sanitize-gpu
sanitize-gpu:
	$(call needs_gpu_and,compute-sanitizer,the CUDA toolkit)
	$(call sanitized,memcheck)
	$(call sanitized,racecheck)
	$(call sanitized,synccheck)

# The environment of a GPU machine, on a CPU.

GPU_VENV ?= .gpu-env
GPU_BIN := $(GPU_VENV)/bin
GPU_PACKAGES_STAMP := $(GPU_VENV)/.chunkft-packages-$(ID)
GPU_BUILD_STAMP := $(GPU_VENV)/.chunkft-build-$(ID)
# What such a machine has: no datasets, no trl, no linters. torch brings triton and the CUDA libraries that it links.
GPU_PACKAGES := torch numpy transformers accelerate peft lightning safetensors matplotlib psutil tqdm \
	pytest pytest-xdist pytest-timeout pytest-benchmark hypothesis pybind11 cmake ninja 'setuptools>=77'
# What a first run on a GPU rests on (CONTRIBUTING.md); those of tests/gpu are collected, to skip for want of a device.
GPU_ENV_TESTS := tests/kernels tests/gpu $(addprefix tests/,test_bench_harness.py test_doctor.py test_driver_prototypes.py \
	test_host_arena.py test_kernel_slices.py test_optimizer_contract.py trainers/test_accelerate_and_trl.py)
# Of these what a release of torch or Triton breaks first; the dry run interprets every kernel.
GPU_ENV_SHORT := $(addprefix tests/,test_compile.py test_compile_order.py test_clipping.py test_optimizer_contract.py \
	test_driver_prototypes.py)
PYTHON312 ?= $(shell for p in python3.12 python3 python "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python3.12 \
	"$$(uv python find 3.12 2>/dev/null)"; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && { echo "$$p"; break; }; done)
# A name space without network, where the kernel lets us have one.
NO_NETWORK = $(shell unshare -rn true 2>/dev/null && echo unshare -rn)

.PHONY: gpu-env
gpu-env: $(GPU_BUILD_STAMP)

# The packages alone: the part that needs a registry.
.PHONY: gpu-packages
gpu-packages: $(GPU_PACKAGES_STAMP)

.PHONY: gpu-env-test
gpu-env-test: $(GPU_BUILD_STAMP)
	OMP_NUM_THREADS=1 $(GPU_BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(GPU_ENV_TESTS) $(ARGS)

.PHONY: gpu-env-check
gpu-env-check: gpu-dry-run
	OMP_NUM_THREADS=1 $(GPU_BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(GPU_ENV_SHORT)

.PHONY: gpu-dry-run
gpu-dry-run: $(GPU_BUILD_STAMP)
	$(GPU_BIN)/python -m bench.gpu_suite --dry-run --minutes 20 --results build $(ARGS)

$(GPU_BUILD_STAMP): $(SOURCES) $(GPU_PACKAGES_STAMP)
	PIP_NO_INDEX=1 $(NO_NETWORK) $(GPU_BIN)/python -m pip install --disable-pip-version-check \
		--no-build-isolation --no-deps --no-index -e .
	@find "$(GPU_VENV)" -maxdepth 1 -name '.chunkft-*' ! -name '*-$(ID)' -delete
	@touch "$@"

$(GPU_PACKAGES_STAMP): constraints-gpu.txt | $(GPU_BIN)/python
	$(GPU_BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints-gpu.txt $(GPU_PACKAGES)
	@touch "$@"

$(GPU_BIN)/python:
	@if [ "$$(uname -s)" != Linux ]; then echo "error: torch is built with CUDA for Linux only; this is $$(uname -s)" >&2; exit 1; fi
	@if [ -e "$(GPU_VENV)" ]; then echo "error: GPU_VENV=$(GPU_VENV) exists but has no bin/python: remove it or name another" >&2; exit 1; fi
	@"$(or $(PYTHON312),false)" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { \
		echo "error: make gpu-env needs Python 3.12 with its venv module, which was found neither on the PATH nor by pyenv or" \
			"uv (PYTHON312='$(PYTHON312)'). Install it: Debian, Ubuntu: apt-get install python3.12-venv python3.12-dev;" \
			"pyenv install 3.12; uv python install 3.12; or set PYTHON312=/path/to/python3.12" >&2; exit 1; }
	"$(PYTHON312)" -m venv "$(GPU_VENV)" || { rm -rf "$(GPU_VENV)"; exit 1; }

.PHONY: clean
clean:
	rm -rf build dist site chunkft.egg-info chunkft/_core.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks

.PHONY: distclean
distclean: clean
	rm -rf "$(VENV)" "$(GPU_VENV)"
