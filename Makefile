# make demo  install into .venv, make a synthetic shop, train every stage, print the table
# make test  install with the dev tools and run the tests
# make lint  ruff and the dependency audit;  make bench  every benchmark, receipts saved
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# One thread a test worker: two workers with two threads each fight for two cores.
WORKERS ?= 2
# Those that need a GPU (gpu.py) or a run (thinker.py, update.py) are started by hand.
BENCHMARKS ?= kernels decode train prepare serve scale ranks throughput

.PHONY: demo test lint bench

demo: $(VENV)/.cpu
	$(BIN)/streamctl demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/audit.py constraints.txt

bench: $(VENV)/.dev
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --json --save || exit 1; done

$(VENV)/.cpu: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[cpu]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[cpu,dev]'
	touch $@ $(VENV)/.cpu
