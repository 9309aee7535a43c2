# make setup       .venv with everything for development
# make demo        a real Llama learns to correct English on this machine
# make test        the whole test suite that CI runs
# make faults      the reliability scorecard (docs/reliability.md): 30 faults, ten figures, minutes; WRITE=--write puts it there
# make test-slow   what takes longer (real weights against PEFT); its last output is in docs/
# make test-gpu    the GPU tests, with whatever PYTHON has (PYTHON=python3); they skip without a CUDA device. Other
#                  tests' files are not read: they import what may not be there
# make bench       packtrain and its installed peers in turn on this machine's GPU, one table (PYTHON=python3); on a CPU: python -m bench.cpu
# make lint        ruff and strict types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test faults test-slow test-gpu bench lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/packtrain demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" tests

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py $(WRITE)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow tests

test-gpu:
	PYTHONPATH=src:tests $(PYTHON) -m pytest -m gpu $$(grep -rl --include='test_*.py' 'mark\.gpu' tests)

bench:
	PYTHONPATH=src:. $(PYTHON) -m bench

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
