# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/demo
	$(BIN)/python -m dwf_cluster.launch --local

test: .venv/test
	$(BIN)/python -m pytest

interruptions: .venv/test
	$(BIN)/python -m pytest -m interruptions

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

.PHONY: demo test interruptions lint
