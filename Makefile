# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/analysis
	$(BIN)/python -m dwf_cluster.launch --local
	@$(MAKE) --no-print-directory report

report: .venv/analysis
	$(BIN)/python -m analysis.report runs --out report.html

test: .venv/test
	$(BIN)/python -m pytest

interruptions: .venv/test
	$(BIN)/python -m pytest -m interruptions -s

soak: .venv/test
	$(BIN)/python -m pytest -m soak -s

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: .venv/audit
	$(BIN)/pip-audit --local --skip-editable

# A stamp for each set of extras that is installed.
.venv/test: EXTRA := [test]
.venv/lint: EXTRA := [lint]
.venv/audit: EXTRA := [audit]
.venv/analysis: EXTRA := [analysis]
.venv/test .venv/lint .venv/audit .venv/analysis: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.$(EXTRA)'
	touch $@

.PHONY: demo report test interruptions soak lint audit
