# Everything a person or a CI machine runs. `make serve` and `make test` start from nothing but Python >= 3.10 and a
# C++ compiler: they make .venv, install into it once (stamped), and go on.

PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 30000
MODEL  ?= aspen
# Pinned, and installed first: an open requirement may resolve to a build with several gigabytes of GPU libraries.
TORCH  ?= torch==2.13.0
PYTEST_ARGS ?=
PEERS_ARGS ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
STAMP := $(VENV)/.installed
DEV   := $(VENV)/.installed-dev
BUILD_INPUTS := pyproject.toml $(wildcard CMakeLists.txt csrc/* csrc/*/* csrc/*/*/*)

CXX ?= c++

.PHONY: serve test sanitize lint type bench bench-peers docs clean install dev help
.DEFAULT_GOAL := help

help:
	@echo "make serve    chat with the built-in model: web page and API on port $(PORT) (MODEL=..., PORT=...)"
	@echo "make test     run the test suite (PYTEST_ARGS=... passes options on)"
	@echo "make sanitize run the kernels' tests under the address and undefined-behaviour sanitizers"
	@echo "make lint     check formatting and style      make type   check types"
	@echo "make bench    quick speed figures of this machine"
	@echo "make bench-peers  compare with other engines: hours, installs them (PEERS_ARGS=... passes options on)"
	@echo "make docs     rewrite the generated pages     make clean  remove builds, caches and $(VENV)"

install: $(STAMP)
dev: $(DEV)

serve: $(STAMP)
	@$(BIN)/pando serve $(MODEL) --port $(PORT) || [ $$? -eq 130 ]

test: $(DEV)
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

# The kernels once more with the address and undefined-behaviour sanitizers, under their own tests.
SANITIZED := build/sanitized
ASAN = $(shell $(CXX) -print-file-name=libasan.so 2>/dev/null)
UBSAN = $(shell $(CXX) -print-file-name=libubsan.so 2>/dev/null)
sanitize: $(DEV)
	@if [ ! -e "$(ASAN)" ] || [ ! -e "$(UBSAN)" ]; then \
	  echo "sanitize: skipped: $(CXX) has no shared sanitizer runtimes (GCC brings them)"; else \
	  SKBUILD_CMAKE_DEFINE=PANDO_SANITIZE=ON SKBUILD_BUILD_DIR=build/sanitize \
	    $(PIP) install --no-deps --upgrade --target $(SANITIZED) . && \
	  LD_PRELOAD="$(ASAN) $(UBSAN)" ASAN_OPTIONS=detect_leaks=0 \
	  PANDO_TEST_NATIVE=$$(ls $(CURDIR)/$(SANITIZED)/pando/kernels/_native*.so) \
	  $(BIN)/python -m pytest -q -p no:cacheprovider -k 'not forked' \
	    tests/kernels/test_cpu*.py tests/kernels/test_attention.py tests/kernels/test_int8_kv.py \
	    tests/kernels/test_step.py tests/kernels/test_mixing.py tests/kernels/test_recurrent_cpu.py \
	    tests/models/test_fused.py tests/engine/test_mixed_traffic.py && \
	  echo "sanitize: clean"; fi

lint: $(DEV)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && echo "lint: clean"

type: $(DEV)
	@$(BIN)/mypy && echo "type: clean"

bench: $(STAMP)
	@$(BIN)/pando bench offline $(MODEL) --num-prompts 32 --input-len 256 --output-len 32

bench-peers: $(STAMP)
	@$(BIN)/python -m benchmarks.peers $(PEERS_ARGS)

docs: $(DEV)
	@$(BIN)/python -c "from pando.cli.flags import markdown; print(markdown(), end='')" > docs/flags.md
	@$(BIN)/python -m tests.test_architecture docs/architecture.md
	@echo "docs: docs/flags.md and the layer table of docs/architecture.md are up to date"

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find pando -name '*.so' -delete

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$($(PYTHON) --version) is too old: Pando needs Python 3.10 or newer (set PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: this Python can not make virtual environments: run  apt-get install python3-venv  (as root) and try again"; exit 1; }
	@echo "make: creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# The environment with torch in it, and what to say when there is no compiler.
$(VENV)/.torch: | $(BIN)/python
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  echo "make: no C++ compiler found: the native kernels are left out and the slower reference path is used"
	@echo "make: installing $(TORCH)"
	@$(PIP) install '$(TORCH)'
	@touch $@

$(STAMP): $(BUILD_INPUTS) | $(VENV)/.torch
	@echo "make: building the native kernels and installing pando"
	@$(PIP) install -e .
	@touch $@

$(DEV): $(BUILD_INPUTS) | $(VENV)/.torch
	@echo "make: building the native kernels and installing pando with the development tools"
	@$(PIP) install -e '.[dev]'
	@touch $(STAMP) $@
