# `make demo` and `make test` need python3 and make only; `make check` is what CI runs.
PYTHON ?= python3
VENV ?= .venv
TL ?= 3.9
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test slow real lint types doctest docs check check-4 benchmark clean

$(VENV)/installed: pyproject.toml constraints/tl-$(TL).txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints/tl-$(TL).txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints/tl-$(TL).txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## SmolLM2 on ten languages: heads and a page of heat maps, in minutes
	$(BIN)/lahis-tl demo

test: $(VENV)/installed  ## the test suite, without the slow tests
	$(BIN)/python -m pytest -n auto

slow: $(VENV)/installed  ## tests on the real model, and the notebooks
	$(BIN)/python -m pytest -m slow tests

real: $(VENV)/installed  ## tests on the real model alone
	$(BIN)/python -m pytest -m slow tests/test_smollm2.py

doctest: $(VENV)/installed
	$(BIN)/python -m pytest -q --doctest-modules lahis_tl analyses

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python

check-4:  ## the suite and the real model on the newest transformer-lens 4
	$(MAKE) test real VENV=$(VENV)-4 TL=4

docs: $(VENV)/installed  ## the documentation as a site; a broken link or a stale docstring is an error
	$(BIN)/mkdocs build --strict

check: lint types doctest docs test slow check-4  ## all of it

benchmark: $(VENV)/installed  ## time and memory against the authors' procedure and the floor
	$(BIN)/python -m analyses.benchmark

clean:
	rm -rf $(VENV) $(VENV)-4 out build dist site
