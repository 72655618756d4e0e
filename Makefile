# `make core-heads` installs and runs the main job on the shipped model; `make paper` runs all experiments on all
# shipped models and writes one report of them; `make test` lints, type-checks and tests; `make test-slow` runs the
# tests that it leaves out.
# All need Python 3.11 and nothing else; the environment is made once, in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/core-heads
PAPER_OUT ?= out/paper
INSTALLED := $(VENV)/.installed

.PHONY: core-heads paper test test-slow lint types tests clean

core-heads: $(INSTALLED)
	$(BIN)/mmlens core-heads --model micro --out $(OUT)

# Runs that are there already are kept, so that what was broken off goes on where it was.
paper: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/mmlens paper --out $(PAPER_OUT) --threads 1 --jobs 2

test: lint types tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# By file: a module's fixtures, some of them whole experiments, are made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

tests: $(INSTALLED)
	$(PYTEST) -m "not slow"

# All families in full, the notebooks, and noise over 200 seeds.
test-slow: $(INSTALLED)
	$(PYTEST) -m slow

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
