# `make demo` and `make test` do all the set-up.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
WHOLE_RUN := test_an_interrupted_and_killed_run_resumes_to_the_same_bits

demo: .venv/analysis
	$(BIN)/python -m dwf_cluster.launch --local
	@$(MAKE) --no-print-directory report

# The paper's Table 3 on the digits, three seeds: docs/defences.md.
table3: .venv/analysis
	$(BIN)/python -m dwf_cluster.launch --local --preset table3-small --seed 0..2 --storage runs-table3
	$(BIN)/python -m analysis.report runs-table3 --out report.html

report: .venv/analysis
	$(BIN)/python -m analysis.report runs --out report.html

test: .venv/test
	$(BIN)/python -m pytest $(OPTIONS)

interruptions: .venv/test
	$(BIN)/python -m pytest -m interruptions -s

# Tests that need a GPU; those for two GPUs are skipped where there is one.
gpu-test: .venv/test
	$(BIN)/python -m pytest -m cuda

soak: .venv/test
	$(BIN)/python -m pytest -m soak -s

# The lowest versions that pyproject.toml allows: the store on a disk and on S3, and a whole run that is interrupted. The
# histories of locks are left out: of a library they need only exclusive creation on S3, which other tests of these need.
lowest: .venv-lowest/installed
	$(LOWEST)/python -m pytest tests/store tests/test_storage.py tests/pipeline/test_run.py::$(WHOLE_RUN) -k "not server_restart and not lock_history"

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: .venv/audit
	$(BIN)/pip-audit --local --skip-editable

# A stamp for each set of extras that is installed. pip is upgraded first, because Debian 12's needs most of an hour
# to choose the versions.
.venv/test: EXTRA := [test]
.venv/lint: EXTRA := [lint]
.venv/audit: EXTRA := [audit]
.venv/analysis: EXTRA := [analysis]
.venv/test .venv/lint .venv/audit .venv/analysis: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.$(EXTRA)'
	test $@ != .venv/test || $(BIN)/pip install --quiet --no-deps --group torchattacks
	touch $@

.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/pip install --quiet uv
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct --editable '.[test]'
	touch $@

.PHONY: demo table3 report test interruptions gpu-test soak lowest lint audit
