# make demo    the whole loop on this machine's CPU, from nothing to a report
# make test    the test suite
# Both set themselves up in .venv, from constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
SOURCES := mathscale_jax data_pipeline eval benchmarks configs docs launch tests setup.py

.PHONY: demo test test-tpu test-slurm parity plan bench docs lint format types constraints clean

demo: $(VENV)/.core
	$(BIN)/python -m data_pipeline prepare demo --out $(DEMO)/data
	$(BIN)/python -m mathscale_jax.train --config configs/demo.yaml
	$(BIN)/python -m eval run --checkpoint $(DEMO)/train --task demo --source $(DEMO)/data/test.jsonl \
	    --out $(DEMO)/eval --dtype float32 --max-tokens 96
	@echo
	@echo "Done. Open $(CURDIR)/$(DEMO)/eval/report.html in a browser."

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist loadfile -m "not torch and not slurm"

# What compiles for TPUs, with the real compiler and no TPU; it is half a gigabyte, so `make test` does not ask for it.
test-tpu: $(VENV)/.tpu
	$(BIN)/pytest -m tpu

# The Slurm scripts on a real Slurm of one node, which the tests start on this machine. Debian, as root.
test-slurm: $(VENV)/.dev
	@command -v slurmctld > /dev/null && command -v munged > /dev/null || \
	    { apt-get update -q && apt-get install -y -q slurm-wlm munge; }
	$(BIN)/pytest -m slurm

# Live comparison with transformers, and the whole loop on a checkpoint that transformers wrote.
parity: $(VENV)/.torch
	$(BIN)/pytest -n 2 -m torch

# The planned figures of every TPU config, in its header and in benchmarks/results/.
plan: $(VENV)/.tpu
	$(BIN)/python -m benchmarks.plan

# Our training step against PyTorch's on this machine; the other benchmarks need data or a GPU: see their --help.
bench: $(VENV)/.torch
	$(BIN)/python -m benchmarks.train --out runs/benchmarks

# The pages of docs/ as a site that opens from disk; a dead link, anchor or module name in them is an error. The variable
# silences a notice of the theme's makers about a mkdocs that is not pinned here.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open $(CURDIR)/runs/site/index.html in a browser."

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(VENV)/.dev
	$(BIN)/mypy
	MYPYPATH=launch $(BIN)/mypy launch/tpu_vm.py launch/check.py

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }

$(VENV)/.core: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once; a minute or two)"
	@$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo "Installing the test tools into $(VENV) (once)"
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.core $@

$(VENV)/.torch: $(VENV)/.dev
	@echo "Installing torch and transformers into $(VENV) (once)"
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev,torch]'
	@touch $@

$(VENV)/.tpu: $(VENV)/.dev
	@echo "Installing the TPU compiler into $(VENV) (once; 700 MB)"
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev,tpu]'
	@touch $@

# With the core, since a page shows every command's --help.
$(VENV)/.docs: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo "Installing what builds the documentation into $(VENV) (once)"
	@$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	@touch $(VENV)/.core $@

# Pins every extra for Python 3.11 and newer. Run after changing a dependency in pyproject.toml.
constraints: $(VENV)/.dev
	$(BIN)/pip install -q uv
	{ echo "# Pins for every extra, on Python 3.11 and newer. Made by: make constraints"; \
	  $(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate -q; \
	} > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) runs build dist *.egg-info
