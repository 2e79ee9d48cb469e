# Tabwise. `make help` lists the targets; `demo` and `test` each do all of their set-up.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH ?=
CUDA ?=
INSTALL = $(PYTHON) scripts/install.py --venv $(VENV) $(if $(TORCH),--torch "$(TORCH)") $(if $(CUDA),--cuda)

.PHONY: help install dev train-deps model demo test unit soak gpu-check check format bench docs picture pins dist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / — /'

install: ## install what is needed to complete and explain
	@$(INSTALL)

dev: ## install what is needed to test and to work on Tabwise
	@$(INSTALL) --extra dev

train-deps: ## install what training needs (torch and more); TORCH= a requirement or a wheel's path
	@$(INSTALL) --extra train

model: install ## bring the starter model onto this machine
	@$(BIN)/tabwise models path starter >/dev/null 2>&1 || $(BIN)/tabwise models pull starter

demo: model ## see it complete and explain real code, through the language server
	@$(BIN)/python -m lsp.demo

test: dev model ## run all tests, the long ones with a tenth of their counts
	@$(BIN)/python -m pytest

unit: dev ## run the fast tests only: no model, no processes
	@$(BIN)/python -m pytest -m "not e2e" -q

soak: dev model ## run all tests with their full counts
	@TABWISE_SOAK=1 $(BIN)/python -m pytest

gpu-check: dev train-deps ## check and measure a GPU with a 7B in four bits; without one it says so
	@$(BIN)/python -m agent.gpu_check $(GPU_CHECK)

check: dev train-deps ## lint, types, direction of imports; types need the libraries of training
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: dev ## format the sources
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: dev model ## measure: start, cancel, overhead, engine, explanation
	@$(BIN)/tabwise bench start
	@$(BIN)/tabwise bench cancel
	@$(BIN)/tabwise bench overhead
	@$(BIN)/tabwise bench engine
	@$(BIN)/tabwise bench explain

docs: dev ## write the pages that are generated from the code
	@$(BIN)/python -m agent.settings_reference > docs/settings.md

picture: model ## draw the demo anew for the README
	@COLUMNS=100 $(BIN)/python -m lsp.demo docs/demo.svg

dist: dev ## build the wheel and the sdist into dist/
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .

pins: ## try the newest versions in an environment of their own, and write constraints.txt
	@$(PYTHON) scripts/pins.py

clean: ## remove what was built and installed here; models and settings stay
	@rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
