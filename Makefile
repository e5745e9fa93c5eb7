# Every target sets up what it needs: a virtual environment with the pinned packages and the compiled extension.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.gaitfast-ready
SOURCES := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

RESULTS ?= benchmarks/results

.PHONY: demo test test-gpu gpu-report lint format setup clean

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "gaitfast needs Python 3.10 to 3.12, and $(PYTHON) is another; try: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Torch first, from the constraint: a bare `torch` would pull another version than the extension is built against.
$(VENV)/.packages: constraints.txt setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	GAITFAST_BUILD=0 $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

$(STAMP): $(VENV)/.packages $(SOURCES) setup.py
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The main job in small: synthetic people -> packed dataset -> diffusion pretraining under DeepSpeed -> report.
SEED ?= 0
demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/gaitfast walkers runs/demo/walkers --subjects 128 --test-subjects 32 \
		--walks 12 --cameras 6 --frames 30 40 --seed $(SEED)
	$(BIN)/gaitfast prepare runs/demo/walkers runs/demo/dataset --layout opengait
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed gaitfast/pretrain.py --config configs/pretrain/demo.yaml --set seed=$(SEED)
	$(BIN)/gaitfast report runs/demo

# A process for every core, a thread for each: the tests are many small ones.
JOBS ?= $(shell nproc)
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(JOBS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# On a machine with a GPU and PyTorch, with no network: no virtual environment, nothing installed. Packages that are
# missing there may lie in a folder on PYTHONPATH. Nine minutes at most; two files in RESULTS.
gpu-report:
	$(PYTHON) -m benchmarks.gpu_report --folder $(RESULTS) --commit "$(COMMIT)"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info gaitfast/_C*.so runs/demo
