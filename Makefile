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

# Of the Kubernetes that `make cluster-up` starts: api (no nodes), nodes (two real ones), fleet (N played ones)
TIER ?= api
N ?= 50
NAME ?= $(TIER)
CLUSTER := PYTHONPATH=tests/cluster $(BIN)/python -m testcluster
# Tiers that run at once must not take each other's notes of what failed.
PYTEST = $(BIN)/python -m pytest -q --durations=10 --durations-min=1 -o cache_dir=$(CACHE)/pytest/$@
# Tests of processes against each other, on two busy cores: up to five that fail are repeated once, alone. Both results
# are printed, each repeated test is named, and `make repeated` counts them; what fails twice fails.
tier = $(PYTEST) $(1) || { echo "some tests failed; they are repeated, alone:"; $(PYTEST) $(1) --last-failed --repeat -n 0; }
# The tests' tiers, the fastest first. `cluster` needs Go, `nodes` root as well.
FAST := not slow and not cluster and not nodes and not soak
BRIEF := -n 3 --dist loadfile
RANKS := -n 2 --dist loadfile
# Tests of the cluster wait most of the time; each process has a control plane of its own (0.5 GB).
WAITING := -n 6 --dist worksteal

.PHONY: help demo demo-data demo-llama test test-unit test-fast test-cluster test-slow repeated check verify generate lock bench setup clean
.PHONY: recordings wheel release
.PHONY: cluster-build cluster-up cluster-down cluster-env cluster-demo e2e soak sanitize scale images manifest audit

help:  ## Show the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# --- the environment

setup: $(VENV)/.kernels  ## Make the virtual environment, and compile the kernel library where there is a compiler

# Two marks: with the lock files' content unchanged, nothing is done.
$(VENV)/.installed: requirements/dev.txt requirements/torch.txt requirements/demo-model.txt requirements/install.sh pyproject.toml
	requirements/install.sh $(PYTHON) $(VENV) requirements/dev.txt
	@touch $@

# A minute or two. Without a compiler it says so, and plain torch multiplies.
$(VENV)/.kernels: $(VENV)/.installed $(wildcard trainer/qlora_trainer/kernels/csrc/*) trainer/qlora_trainer/kernels/build.py
	$(BIN)/python -m qlora_trainer.kernels.build --if-possible
	@touch $@

# The backends beside gloo: needs g++.
$(VENV)/.backends: $(VENV)/.kernels requirements/backends.txt $(wildcard trainer/qlora_trainer/*/*/csrc/* trainer/qlora_trainer/native/*.py)
	$(UV) install --python $(BIN)/python --quiet --no-deps --require-hashes -r requirements/backends.txt
	$(BIN)/python -m qlora_trainer.native.build
	@touch $@

$(VENV)/.bench: $(VENV)/.installed requirements/bench.txt
	$(UV) install --python $(BIN)/python --quiet --no-deps --require-hashes -r requirements/bench.txt
	@touch $@

# --- the demo: a real small model, real data, two ranks

$(MODEL)/config.json: $(VENV)/.installed demo/model.py
	$(BIN)/python demo/model.py $(MODEL)

$(DATA)/train.jsonl: $(VENV)/.installed demo/data.py
	$(BIN)/python demo/data.py $(DATA)

demo-data: $(VENV)/.kernels $(MODEL)/config.json $(DATA)/train.jsonl  ## Write the demo's model and data

demo: demo-data  ## Set everything up and fine-tune a small model on this machine with two ranks
	@mkdir -p $(WORK)
	$(BIN)/qlora run manifests/samples/demo.yaml --volume demo=$(CACHE)/demo
	$(BIN)/python demo/ask.py $(MODEL) $(WORK)/jobs/demo/adapter

demo-llama: demo  ## Ask the demo's model in llama.cpp too
	$(BIN)/qlora export $(WORK)/jobs/demo --format gguf --gguf-type q4_k_m --model $(MODEL)
	$(BIN)/python demo/ask_llama.py $(WORK)/jobs/demo/exports/gguf-q4_k_m/demo-q4_k_m.gguf

# --- the checks

test: test-fast test-cluster test-slow  ## Set everything up and run the tests, fast ones first

test-unit: setup  ## Run the tests that start no process and import no torch: under a minute
	$(PYTEST) --unit -n 2 -m "$(FAST)" tests/qlora_contract tests/qlora_operator tests/qlora_trainer tests/repository

test-fast: demo-data $(VENV)/.backends  ## Run the fast tests
	$(call tier,$(BRIEF) -m "$(FAST)")

test-cluster: demo-data $(VENV)/.backends  ## Run the tests against a real API server
	$(CLUSTER) build --tier fleet
	-$(CLUSTER) build --program kueue  # without it, its tests are skipped
	$(call tier,$(WAITING) -m "cluster and not soak")

test-slow: demo-data $(VENV)/.backends  ## Run the tests of ranks that are processes and really train
	$(call tier,$(RANKS) -m "slow and not cluster and not nodes and not soak")

repeated:  ## Say which tests had to be repeated since the last time it was asked
	@touch $(CACHE)/repeated-tests.txt; \
	 echo "$$(wc -l < $(CACHE)/repeated-tests.txt) tests were repeated"; cat $(CACHE)/repeated-tests.txt; rm $(CACHE)/repeated-tests.txt

e2e: demo-data cluster-build  ## Run the tests on two real nodes (root; about 30 GB of disk)
	$(call tier,-m "nodes and not soak")

# Faults that are drawn anew each time: `make soak SOAK_SEED=...` repeats those of a seed, which stands in the tests' names.
soak: export SOAK_SEED ?= $(shell date +%s)
soak: export SOAK_TABLE ?= $(CACHE)/soak-faults.txt
soak: demo-data $(VENV)/.backends  ## Run the long random tests; 200 faults of running jobs are listed in .cache/soak-faults.txt
	$(CLUSTER) build --tier fleet
	@rm -f $(SOAK_TABLE)
	$(PYTEST) -n 2 -m "soak and slow"
	$(PYTEST) $(WAITING) -m "soak and not slow"

sanitize: setup  ## The kernel library's tests under the sanitizers of addresses, undefined behaviour and threads (g++)
	$(BIN)/python tests/support/sanitized_kernels.py address,undefined
	$(BIN)/python tests/support/sanitized_kernels.py thread

check: setup  ## Lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python requirements/audit.py

audit: setup  ## Look for known vulnerabilities of the locked packages
	$(BIN)/python requirements/audit.py

verify: setup  ## Generated files are what their sources say
	$(BIN)/python manifests/generate.py --check
	$(BIN)/python manifests/models.py --check
	$(BIN)/python manifests/data.py --check
	$(BIN)/python manifests/sizes.py --check

generate: setup  ## Write the generated files
	$(BIN)/python manifests/generate.py
	$(BIN)/python manifests/models.py
	$(BIN)/python manifests/data.py
	$(BIN)/python manifests/sizes.py

images: setup  ## Build both images and list what is in them (docker, podman or buildah; Go for the list)
	SYFT="$$(PYTHONPATH=tests/cluster $(BIN)/python -c \
	    'from testcluster.binaries import built; print(built("syft"))')" images/build.sh

recordings: setup  ## Record the terminal pictures of the documentation anew: a minute of real runs
	$(BIN)/python docs/recordings/make.py

wheel: setup  ## Build wheel and source distribution into dist/
	$(BIN)/python -m hatchling build -d dist

TAG ?= v$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REGISTRY ?= REGISTRY
release: setup  ## Build all of a release into dist/ and print how to publish it: TAG=..., REGISTRY=... (docs/releasing.md)
	HELM="$$(PYTHONPATH=tests/cluster $(BIN)/python -c \
	    'from testcluster.binaries import ensure; print(ensure("api", "helm")["helm"])')" \
	SYFT="$$(PYTHONPATH=tests/cluster $(BIN)/python -c \
	    'from testcluster.binaries import built; print(built("syft"))')" \
	$(BIN)/python manifests/release.py $(TAG) --registry $(REGISTRY)

manifest: setup  ## Write manifests/install.yaml, which is the rendered chart; needs Go for helm
	$(BIN)/python manifests/generate.py --helm "$$(PYTHONPATH=tests/cluster $(BIN)/python -c \
	    'from testcluster.binaries import ensure; print(ensure("api", "helm")["helm"])')"

bench: $(VENV)/.bench $(VENV)/.backends demo-llama  ## Compare with the peers, each at length: hours on two cores (see trainer/benchmarks/LOG.md)
	$(BIN)/python trainer/benchmarks/against_trl.py
	$(BIN)/python trainer/benchmarks/convergence.py
	$(BIN)/python trainer/benchmarks/pinning.py
	$(BIN)/python trainer/benchmarks/allreduce.py
	taskset -c 1 $(BIN)/python trainer/benchmarks/linear.py
	$(BIN)/python trainer/benchmarks/load.py .cache/bench

scale: setup  ## Measure the operator with 500 jobs (see operator/benchmarks/LOG.md)
	PYTHONPATH=tests/cluster $(BIN)/python operator/benchmarks/scale.py

# --- a real Kubernetes on this machine

cluster-build: setup  ## Build what the tests' clusters need: Kubernetes, nodes, images
	$(CLUSTER) build --tier nodes

cluster-up: setup  ## Start one: TIER=api|nodes|fleet, NAME=..., N=nodes of the fleet
	$(CLUSTER) up --tier $(TIER) --name $(NAME) $(if $(filter fleet,$(TIER)),--nodes $(N))

cluster-env: setup  ## Print what to export so that kubectl and helm reach it: NAME=...
	@$(CLUSTER) env --name $(NAME)

cluster-down: setup  ## Remove it: NAME=... (default: the tier's)
	$(CLUSTER) down --name $(NAME)

cluster-demo: demo-data  ## The whole way on two real nodes: chart, job, adapter, answer (root)
	$(CLUSTER) up --tier nodes --name demo
	$(CLUSTER) volume team demo --name demo
	eval "$$($(CLUSTER) env --name demo)" && demo/cluster.sh team --values demo/small-cluster.yaml
	@echo; echo "The cluster stays: eval \"\$$(make -s cluster-env NAME=demo)\"; make cluster-down NAME=demo"

lock: setup  ## Resolve the dependencies anew
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python requirements/lock.py

clean:  ## Remove the environment and the demo
	rm -rf $(VENV) $(CACHE)
