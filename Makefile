# Two commands do everything: `make quickstart` and `make test`. `make check` lints, formats, types and audits.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Where CPU builds of torch live, asked only when the configured package index has none.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Two processes, a file of tests in one of them, in the order of tests/conftest.py: many tests wait more than they compute.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install quickstart test test-slow check format lock clean

help:
	@echo "make quickstart   install, start a local Ray cluster, run the whole recipe, print where the report is"
	@echo "make test         install and run the tests"
	@echo "make test-slow    all tests, those that take minutes as well"
	@echo "make check        lint, format check, types, known holes of pinned packages"
	@echo "make format       format the code"
	@echo "make lock         write constraints.txt anew from pyproject.toml"
	@echo "make clean        remove the virtual environment and the quickstart's results"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	TORCH_CPU_INDEX=$(TORCH_CPU_INDEX) jobs/install.sh
	touch $@

quickstart: $(INSTALLED)
	jobs/quickstart.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest $(IN_TWO)

test-slow: $(INSTALLED)
	ULTRALONG_SLOW_TESTS=1 $(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python .ci/audit

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(INSTALLED)
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) runs
