# Every door into the project. `make demo` and `make test` need nothing but Python.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two busy processes with as many threads each as cores run ten times slower.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast check check-style format bench clean

help:
	@echo "make demo       the main job, end to end, on a corpus the package makes itself"
	@echo "make test       every test"
	@echo "make test-fast  the tests that take a few seconds each"
	@echo "make check      format, lint, types, fast tests"
	@echo "make bench      measure, and write the table"
	@echo "make install    only the virtual environment in .venv/"
	@echo "make format     put the code into its format"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "needs Python 3.11 or newer: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS="ignore:Editable installation" $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/crysdistill demo

# Whole files, in the order of tests/conftest.py: each makes its stores and runs once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
	--no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST)

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow"

check: check-style test-fast

check-style: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info
