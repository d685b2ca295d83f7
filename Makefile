# Each target sets up what it needs in .venv and is a no-op where that is done already.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test slow check bench docs wheel clean

demo: .venv/demo.stamp
	$(BIN)/python examples/demo.py

test: .venv/test.stamp
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

slow: .venv/test.stamp
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m slow

check: .venv/dev.stamp .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py

bench: .venv/bench.stamp
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/tables.py

docs: .venv/docs.stamp
	$(BIN)/sphinx-build --quiet --fail-on-warning docs build/docs

wheel: .venv/dev.stamp
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

.venv/%.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv dist build demo-output *.egg-info
