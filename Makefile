# `make core-heads` installs and runs the main job on the shipped model; `make paper` runs all experiments on all
# shipped models and writes one report of them; `make test` lints, type-checks and tests; `make test-slow` runs the
# tests that it leaves out; `make test-versions` runs what depends on versions in two environments that users have;
# `make test-newest` runs `make test`'s tests on the newest packages that pyproject.toml admits; `make dist` builds what
# is released. All need Python 3.11, 3.12 or 3.13 and nothing else; the environment is made once, in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/core-heads
PAPER_OUT ?= out/paper
INSTALLED := $(VENV)/.installed

.PHONY: core-heads paper test test-slow test-versions test-torchvision test-previous test-newest lint types tests dist \
	clean

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

# By file: a module's fixtures, some of them whole experiments, are made once. Compiled files are kept: many tests start
# programs that import the package.
WORKERS ?= 2
RUN_TESTS := -m pytest -n $(WORKERS) --dist loadfile
ENVIRONMENT := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
PYTEST := $(ENVIRONMENT) $(BIN)/python $(RUN_TESTS)

tests: $(INSTALLED)
	$(PYTEST) -m "not slow"

# All families in full, the notebooks, the README, and simulations.
test-slow: $(INSTALLED)
	$(PYTEST) --no-loadscope-reorder -m slow

# What reads transformers' models, processors, caches and attention: the rest is arithmetic on what these give.
VERSIONED := tests/families tests/test_internals.py $(addprefix tests/model/test_,chat.py chat_equality.py hooked_vlm.py prompt.py) \
	tests/effects/test_partial.py $(addprefix tests/interventions/test_,attention_edges.py continued.py edits.py \
	empty_rows.py)

test-versions: test-torchvision test-previous

# What `pip install torch torchvision` gives on Linux: torch's CUDA build, which also runs without a GPU. Packages for
# quantised weights are there too.
TORCHVISION := $(VENV)-torchvision

test-torchvision: $(TORCHVISION)/.installed
	$(ENVIRONMENT) $(TORCHVISION)/bin/python $(RUN_TESTS) -m "not slow" $(VERSIONED) \
		tests/model/test_quantised.py

$(TORCHVISION)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TORCHVISION)
	$(TORCHVISION)/bin/python -m pip install -q torch==2.14.1 torchvision==0.29.1
	grep -v '^torch==' constraints.txt > $(TORCHVISION)/constraints.txt
	$(TORCHVISION)/bin/python -m pip install -q -c $(TORCHVISION)/constraints.txt -e ".[test,quantised]"
	touch $@

# The oldest transformers that pyproject.toml admits, laid over the environment of the newest.
PREVIOUS := $(VENV)-previous

test-previous: $(PREVIOUS)/.installed
	PYTHONPATH=$(PREVIOUS) $(PYTEST) -m "not slow" $(VERSIONED)

$(PREVIOUS)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install -q --no-deps --target $(PREVIOUS) transformers==5.23.0
	touch $@

# Without constraints, to hear of a release that breaks something before its users do.
NEWEST := $(VENV)-newest

test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --upgrade -e ".[test]"
	$(NEWEST)/bin/python -m pip freeze --exclude-editable
	$(ENVIRONMENT) $(NEWEST)/bin/python $(RUN_TESTS) -m "not slow"

dist:
	$(PYTHON) -m venv --clear $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install -q build twine
	rm -rf dist
	$(VENV)-dist/bin/python -m build --outdir dist
	$(VENV)-dist/bin/python -m twine check --strict dist/*

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(TORCHVISION) $(PREVIOUS) $(NEWEST) $(VENV)-dist out build dist *.egg-info
