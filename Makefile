# One-word commands. `make run` and `make test` set a fresh machine up by themselves: Python 3.11 or later, make, git
# and a pip index are all they need.

PYTHON ?= python3
PORT   ?= 3000
VENV   := .venv
VLLM   := .venv-vllm
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install run test test-fast check docs bench serve ui vllm lock clean help
.DEFAULT_GOAL := help

install: $(VENV)/.runtime ## set .venv up with the pinned packages, once; then `.venv/bin/bessemer --help`

run: $(VENV)/.runtime ## train, align, shrink and package a model, then talk to it
	@$(BIN)/bessemer run
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/bessemer chat; else $(BIN)/bessemer chat --samples; fi

test: $(VENV)/.dev ## run the tests, two at a time; they need no network
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.dev ## run the tests that train nothing and start no server, for the inner loop
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not network and not gpu and not heavy"

check: $(VENV)/.dev ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.dev ## write the generated pages of docs/reference/
	@$(BIN)/python -m flows.cli_reference
	@$(BIN)/bessemer params --markdown > docs/reference/settings.md

bench: $(VENV)/.dev ## measure against peers; `make bench-NAME` runs one
	@$(BIN)/python -m benchmarks

bench-%: $(VENV)/.dev
	@$(BIN)/python -m benchmarks $*

serve: $(VENV)/.runtime ## answer on http://localhost:$(PORT); `make serve PORT=8000` takes another port
	@$(BIN)/bessemer serve --port $(PORT)

ui: $(VENV)/.runtime ## Prefect's server with its web page: runs, graphs, artifacts
	@$(BIN)/bessemer ui

vllm: $(VLLM)/.installed ## the environment in which vLLM samples for PPO, on a CPU; docs/guides/alignment.md says how on a GPU

# What is installed are the two locks; what they were made from is pyproject.toml. optimum-intel asks for torchvision,
# which nothing here uses and which breaks every import of a model beside another build of torch: it comes last and alone.
$(VENV)/.runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Bessemer needs Python 3.11 or later; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "No virtual environment could be made: Debian and Ubuntu need 'apt install python3-venv' first."; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (once; about two minutes and 2 GB) ..."
	@grep -v '^optimum-intel==' requirements.lock > $(VENV)/with-dependencies.txt
	@$(PIP) install -qq --no-compile --requirement $(VENV)/with-dependencies.txt
	@$(PIP) install -qq --no-compile --no-deps --requirement requirements.lock
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true # on all cores; some packages carry templates
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.lock
	@echo "Installing the development tools into $(VENV) (once; some seconds) ..."
	@$(PIP) install -qq --constraint requirements.lock --requirement requirements-dev.lock
	@touch $@

# Without dependencies: the lock holds all, and what pip would add beside it does not fit torch's CPU build.
$(VLLM)/.installed: requirements-vllm.lock
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "Installing vLLM into $(VLLM) (once; some minutes and 3 GB) ..."
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --requirement requirements-vllm.lock
	@touch $@

# A fresh environment, the newest releases within pyproject.toml's bounds, and what pip says it holds then. Left out:
# the project itself, pip, torchvision (see above), and local build tags (`+cpu`), so that one lock serves every build of
# a package.
FREEZE := freeze --all --exclude bessemer --exclude pip --exclude torchvision | sed -E 's/\+[A-Za-z0-9.]+$$//' | LC_ALL=C sort -f

lock: ## make the lock files anew from pyproject.toml (a few minutes)
	@rm -rf .lock && $(PYTHON) -m venv .lock/venv
	@echo "Resolving and installing the runtime packages ..."
	@.lock/venv/bin/python -m pip install -qq --upgrade .
	@{ echo "# Runtime packages. Made by 'make lock' from pyproject.toml."; .lock/venv/bin/python -m pip $(FREEZE); } > .lock/runtime
	@echo "Adding the development tools ..."
	@.lock/venv/bin/python -m pip install -qq --constraint .lock/runtime '.[dev]'
	@{ echo "# Development tools, on top of requirements.lock. Made by 'make lock' from pyproject.toml."; \
	   .lock/venv/bin/python -m pip $(FREEZE) | grep -vxFf .lock/runtime; } > .lock/dev
	@mv .lock/runtime requirements.lock && mv .lock/dev requirements-dev.lock
	@.lock/venv/bin/python -m serving.lock
	@rm -rf .lock build bessemer.egg-info
	@wc -l requirements.lock requirements-dev.lock serving/requirements.txt

clean: ## drop the environment and every cache that can be made again (results in data/ and DVC's cache stay)
	@rm -rf $(VENV) $(VLLM) .lock build bessemer.egg-info .mypy_cache .pytest_cache .ruff_cache data/.scratch
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
