PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test bench clean

demo: $(READY)
	$(BIN)/python -m lightning_collapse demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(READY)
	$(BIN)/python -m tests.benchmarks.vicreg_covariance
	$(BIN)/python -m tests.benchmarks.monitor_overhead

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
