# Everything starts from here; see README.md. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-full check format lock clean

# The newest Python that the lock is made for. No path here is absolute, so a checkout may lie in a folder with spaces.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

demo: $(READY) ## Walk the whole road on simulated scans (about ten minutes, no download)
	@$(BIN)/medseg demo

test: check ## Lint, type-check and test, within ten minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --cov --cov-report= tests
	@$(BIN)/python -m coverage report --skip-covered --sort=cover --fail-under=80 | tail -n 15

test-full: $(READY) ## The slow tests
	@OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow tests

check: $(READY) ## ruff, mypy --strict, import-linter, yamllint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/yamllint --strict configs data_manifests docker .pre-commit-config.yaml

format: $(READY) ## Format the code
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

lock: $(READY) ## Make requirements.lock anew from pyproject.toml
	@echo "torch==2.13.0" > .venv/torch.txt
	@$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --constraint .venv/torch.txt \
		--no-header --no-annotate --no-emit-package triton --output-file requirements.lock
	@sed -i -E '/^(nvidia-|cuda-)/d' requirements.lock

clean: ## Remove the environment and caches (never a workspace)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .coverage*

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: sudo apt-get install python3 python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv; \
		echo "Python's venv module is missing; installing it" >&2; \
		SUDO=$$(test $$(id -u) = 0 || echo sudo); $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq python3-venv >/dev/null && $(PYTHON) -m venv .venv; } || \
		{ rm -rf .venv; echo "Install Python's venv module and run make again: sudo apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing into .venv (a minute or two the first time) ..." # --no-compile: most modules are never imported
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)
