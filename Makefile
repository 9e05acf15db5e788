# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/demo
	$(BIN)/python -m dwf_cluster.launch --local

test: .venv/test
	$(BIN)/python -m pytest

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A stamp for each set of extras that is installed.
.venv/test: EXTRA := [test]
.venv/lint: EXTRA := [lint]
.venv/demo .venv/test .venv/lint: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.$(EXTRA)'
	touch $@

.PHONY: demo test lint
