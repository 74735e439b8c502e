# Every target makes or reuses .venv and installs what it needs. Needs Python 3.11 or newer, and make.
PYTHON ?= python3
BIN := .venv/bin
# The models of the tests are tiny: one thread each and two files at a time are faster than two threads for one.
JOBS ?= 2
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
INPUTS := pyproject.toml constraints.txt

.PHONY: help demo test support check format clean

help:
	@echo "make demo    tune a small real model on support messages, under two minutes on two cores"
	@echo "make test    run the tests"
	@echo "make support try every method and strategy on every architecture, write docs/support.md"
	@echo "make check   formatting, lint, types, import contracts"
	@echo "make format  format the code"
	@echo "make clean   remove .venv and caches"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hybridtune needs Python 3.11 or newer, found: $$($(PYTHON) --version). Mend: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python $(INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

.venv/dev: .venv/bin/python $(INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/demo

demo: .venv/demo
	$(BIN)/hybridtune demo --overwrite

test: .venv/dev
	$(RUN) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

support: .venv/dev
	$(RUN) $(BIN)/python tests/support.py

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
