PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-peers/bin
DIST := .venv-dist/bin
DOCS := .venv-docs/bin
DOCS_READY := .venv-docs/.ready
PEERS_READY := .venv-peers/.ready

.PHONY: demo test bench faults cuda peers zoo dist docs clean

demo: $(READY)
	$(BIN)/python -m lightning_collapse demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --max-worker-restart 0

zoo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.zoo

# random fits, bare and watched, must end alike
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --trials 1000 --seed 0 --workers 2

# on a machine with a GPU, in at most eight minutes; says so in one line elsewhere
cuda: $(READY)
	$(BIN)/python -m tests.cuda

bench: $(READY)
	$(BIN)/python -m tests.benchmarks.vicreg_covariance
	$(BIN)/python -m tests.benchmarks.losses
	$(BIN)/python -m tests.benchmarks.monitor_overhead
	$(BIN)/python -m tests.benchmarks.guard_overhead
	$(BIN)/python -m tests.benchmarks.every_step
	$(BIN)/python -m tests.benchmarks.attention_entropy
	$(BIN)/python -m tests.benchmarks.weight_spectrum
	$(BIN)/python -m tests.benchmarks.neural_collapse
	$(BIN)/python -m tests.benchmarks.continual
	$(BIN)/python -m tests.benchmarks.projection
	$(BIN)/python -m tests.benchmarks.compiled
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.false_alarms

peers: $(PEERS_READY)
	OMP_NUM_THREADS=1 $(PEERS)/python -m tests.benchmarks.peers
	OMP_NUM_THREADS=1 $(PEERS)/python -m tests.benchmarks.losses lightly

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

# apart from `.venv`: stable-pretraining adds callbacks to every trainer of its environment; of its 30 dependencies
# these are the ones that its callbacks import, so it comes last and without the others
$(PEERS_READY): Makefile pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet --constraint constraints.txt --editable ".[examples]" \
		torchvision==0.28.0 lightly==1.6.0 datasets==5.2.0 kornia==0.9.0 loguru==0.7.3 prettytable==3.18.0 \
		requests==2.34.2 requests-cache==1.3.3 rich tabulate==0.10.0 timm==1.0.31 transformers==5.23.0
	$(PEERS)/python -m pip install --quiet --no-deps stable-pretraining==0.1.8
	touch $(PEERS_READY)

# the wheel alone, in an environment of its own, must run the first lines that the README shows
dist:
	rm -rf dist .venv-dist
	$(PYTHON) -m venv .venv-dist
	$(DIST)/python -m pip install --quiet build==1.3.0
	$(DIST)/python -m build --outdir dist .
	$(PYTHON) -m venv --clear .venv-dist
	$(DIST)/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	awk '/^```python/ {inside = 1; next} /^```/ && inside {exit} inside' README.md > dist/first_lines.py
	cd dist && ../$(DIST)/python -W ignore first_lines.py
	rm -rf .venv-dist dist/first_lines.py dist/lightning_logs

# the API reference from the docstrings; a warning or a reference to nothing is an error
docs: $(DOCS_READY)
	rm -rf dist/docs .docs/api
	$(DOCS)/sphinx-build -W --keep-going -n -q -d .docs/.doctrees .docs dist/docs

$(DOCS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/python -m pip install --quiet --constraint constraints.txt --editable . furo sphinx
	touch $(DOCS_READY)

clean:
	rm -rf .venv .venv-peers .venv-dist .venv-docs .docs/.doctrees .docs/api dist .mypy_cache .pytest_cache .ruff_cache
