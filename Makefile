# On a machine with Python 3.11 or newer and nothing else: `make demo`, `make test`.
# The virtual environment is made once, and again only when pyproject.toml or the
# version of lmdeploy changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
LMDEPLOY := $(shell sed -n 's/^version = "\(.*\)"/\1/p' third_party/lmdeploy/VERSION)
NATIVE = $(shell find third_party runtime benchmarks -name '*.h' -o -name '*.c' -o -name '*.cc')
WARNINGS := -O2 -Wall -Wextra -Werror -c -o /dev/null
CXXSTD := -std=c++17 -D_GLIBCXX_USE_CXX11_ABI=0 -Wno-invalid-offsetof -Ithird_party/patches/lmdeploy
CPU_TORCH := torch==2.13.0+cpu
CPU_WHEELS := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/pip install --disable-pip-version-check --no-warn-conflicts --quiet
JOBS ?= 2
TEST_FLAGS ?=

# One thread an instance: two that wait for each other at a barrier are slower than one.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint bench gate docs docs-check clean

help:
	@echo "make demo      serve two examples: text as it streams, tables, pictures, an explanation"
	@echo "make test      all tests but the slow ones; make test-all runs those too"
	@echo "make lint      ruff, mypy, clang-format; compilers with warnings as errors"
	@echo "make bench     the benchmarks; tables on the screen, JSON and Markdown in out/"
	@echo "make gate      whether a change made simulated serving worse than the stored baseline"
	@echo "make docs      write what is generated in docs/"
	@echo "make clean     remove what was made, the environment too"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml third_party/lmdeploy/VERSION
	@test -n "$(PYTHON)" || { echo "no python3 here; sagec needs Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"{sys.executable} is Python {v[0]}.{v[1]}; sagec needs 3.11 or newer: make PYTHON=..." if v < (3, 11) else 0)'
	@$(PYTHON) -c 'import ensurepip' || { echo "this Python cannot make environments; on Debian: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Without a GPU the build for CPUs: small, and beside one for CUDA TurboMind's toy cannot run.
	@command -v nvidia-smi >/dev/null || $(PIP) $(CPU_TORCH) 2>/dev/null || $(PIP) --extra-index-url $(CPU_WHEELS) $(CPU_TORCH) 2>/dev/null || true
	@# The version that the figures were taken with, or where it is not to be had, any that will do.
	$(PIP) torch==2.13.0 || $(PIP) "torch>=2.4"
	$(PIP) --editable ".[torch,turbomind,solver,telemetry,dev]"
	@# Without what its metadata asks for, which is an older torch; what it imports came just now.
	$(PIP) --no-deps --only-binary :all: lmdeploy==$(LMDEPLOY) || echo "no lmdeploy $(LMDEPLOY) for this Python or machine: tests of the turbomind engine will say that they were skipped"
	@touch $@

demo: $(INSTALLED)
	@mkdir -p out
	$(BIN)/sagec run examples/chat.sage --timeline out/chat.svg
	@echo; echo "Two strategies on one file: whoever came first, and whoever was promised something."
	$(BIN)/sagec run examples/rivals.sage --strategy fifo --timeline out/fifo.svg --record out/fifo.rec
	$(BIN)/sagec run examples/rivals.sage --strategy slo-aware --timeline out/slo-aware.svg
	@echo; echo "Why the question about tokens had to wait under fifo:"
	$(BIN)/sagec explain out/fifo.rec --request token

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) $(TEST_FLAGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) -m "slow or not slow" $(TEST_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror --style=file:third_party/.clang-format $(NATIVE)
	@echo "$(CC) and $(CXX), warnings as errors"
	@printf '%s\n' $(filter %.c,$(NATIVE)) | xargs -P $(JOBS) -I{} $(CC) -std=gnu11 $(WARNINGS) {}
	@printf '%s\n' $(filter %.cc,$(NATIVE)) | xargs -P $(JOBS) -I{} $(CXX) $(CXXSTD) $(WARNINGS) {}

bench: $(INSTALLED)
	@mkdir -p out
	$(BIN)/python benchmarks/round.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/kv.py
	$(BIN)/python benchmarks/recorder.py
	$(BIN)/python benchmarks/strategies.py
	$(BIN)/python benchmarks/hooks.py

gate: $(INSTALLED)
	@mkdir -p out
	$(BIN)/python benchmarks/gate.py --report out/gate.md

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

docs-check: $(INSTALLED)
	$(BIN)/python docs/generate.py --check

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
