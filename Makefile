# make demo: train the built-in student.  make test: the tests.  make test-slow: the long trials.  make test-all: both at once.
# make lint: style and types.
# make test-machines: the numeric tests on the arithmetic of other processors.
# Each makes .venv first where it is missing or older than pyproject.toml; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
DEV = $(VENV)/.ready-dev

.PHONY: demo test test-slow test-all test-machines lint venv

demo: $(READY)
	$(BIN)/qcrd-fast demo --output-dir runs/demo --compare dss --resume auto

# Files in the order that conftest gives them, two at a time: xdist orders by the number of tests, and the longest comes last.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(DEV)
	$(PYTEST) -m "not slow"

test-slow: $(DEV)
	$(PYTEST) -m slow $$(grep -lr "mark\.slow" tests --include="test_*.py" | sort)

test-all: $(DEV)
	$(PYTEST)

test-machines: $(DEV)
	PYTHON=$(BIN)/python tests/support/on_machines.sh

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(DEV)

# torch comes first and by itself, so that whichever build pip is set up to find (CPU or CUDA) is the one used.
# pip would compile 15,000 files one after another; what some package brings that is no Python stays as it is.
INSTALL = $(BIN)/pip install --no-compile
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "qcrd-fast needs Python 3.10 or newer; name one with: make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments (no ensurepip); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) "torch==2.13.0"
	$(INSTALL) -e ".[report]"
	$(COMPILE)
	touch $@

$(DEV): $(READY)
	$(INSTALL) -e ".[dev]"
	$(COMPILE)
	touch $@
