# Each target sets up what it needs in .venv, once: a stamp there is renewed when pyproject.toml or constraints.txt change.

PYTHON := python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

# Small models on several spinning threads are far slower than on one.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu-path mutants bench chaos gpu check site check-report reproduce clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.stamp-run ## Distil the embedded teacher in runs/demo, evaluate it, write runs/demo/report.html
	$(BIN)/phased-dmd distill nano-t2i --output runs/demo
	$(BIN)/phased-dmd evaluate runs/demo --samples 400
	$(BIN)/phased-dmd report runs/demo

# Counting lines and checking shapes slows every test of a process. Files in their own order: one of few tests can be long.
test: .venv/.stamp-dev ## Run the tests; the pure mathematics must be covered to 95 %
	$(BIN)/pytest -n 2 --dist loadfile tests/maths --jaxtyping-packages=phased_dmd.maths,beartype.beartype \
		--cov=phased_dmd.maths --cov-report=term-missing --cov-fail-under=95
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/maths

test-gpu-path: .venv/.stamp-dev ## Run the tests on a pretended GPU (g++, and a torch without CUDA)
	$(BIN)/python tests/pretend/run.py $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

mutants: .venv/.stamp-dev ## Change the mathematics in a thousand places; the tests must notice 95 % (docs/mutants.md)
	rm -rf mutants
	$(BIN)/mutmut run --max-children 1
	$(BIN)/mutmut results
	$(BIN)/mutmut export-cicd-stats
	$(BIN)/python -c "import json; found = json.load(open('mutants/mutmut-cicd-stats.json')); print(found); \
		assert found['killed'] + found['timeout'] >= 0.95 * found['total']"

chaos: .venv/.stamp-dev ## Kill runs at random moments, resume and compare them; a thousand mutated configs; two processes at length
	$(BIN)/python scripts/chaos.py
	$(BIN)/python scripts/fuzz.py
	NANO_ITERATIONS=20 $(BIN)/pytest tests/engine/test_distributed.py

bench: .venv/.stamp-bench ## Measure overhead, memory, sampling, what a quality costs, and a peer; writes docs/results/performance
	$(BIN)/python benchmarks/performance.py

gpu: .venv/.stamp-dev ## Check on a real GPU, in ten minutes, what the tests only pretend; writes docs/results/gpu
	$(BIN)/python scripts/gpu.py

check: .venv/.stamp-dev ## Lint, formatting, types, the order of the layers, docstrings that are sentences, and the site
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_sentences.py
	$(BIN)/python scripts/build_site.py

site: .venv/.stamp-dev ## Build the documentation as a site, build/site/index.html; a link that leads nowhere is an error
	$(BIN)/python scripts/build_site.py

check-report: .venv/.stamp-dev ## Check report pages of tiny runs in a headless Chromium, the system's
	$(BIN)/python scripts/check_report.py

reproduce: .venv/.stamp-dev ## Make the committed results again
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/reproduce.sh

clean: ## Remove .venv, build outputs and caches; runs/ stays
	rm -rf .venv build dist mutants src/*.egg-info .coverage .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/.stamp-run: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e .
	touch $@

.venv/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e '.[dev,eval]'
	touch .venv/.stamp-run $@

.venv/.stamp-bench: .venv/.stamp-dev
	$(INSTALL) -e '.[bench]'
	touch $@
