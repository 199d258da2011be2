# make demo   sets everything up and runs the demo
# make test   sets everything up and runs the tests (SLOW=1: also the slow ones)
# make site   builds the documentation site into build/site; a broken link is an error
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SLOW ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo test lint bench docs site clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | test | lint | bench | docs | site | clean"

# A new lock or a new pyproject.toml brings the environment up to date.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("delible needs Python 3.11 or newer: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the locked dependencies into $(VENV) (some minutes the first time) …"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	$(BIN)/delible demo $(DEMO_ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile $(if $(SLOW),,-m "not slow") $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(READY)
	$(BIN)/python performance/training.py $(BENCH_ARGS)

docs: $(READY)
	$(BIN)/python -m delible.cli.docs docs

# The builder lives in an environment of its own: it shares nothing with the library.
SITE_VENV := build/site-venv

$(SITE_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(SITE_VENV)
	$(SITE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(SITE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --group docs
	@touch $@

site: $(SITE_VENV)/.ready
	$(SITE_VENV)/bin/zensical build --clean --strict
	@echo "Open build/site/index.html"

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests performance examples -name __pycache__ -type d -prune -exec rm -rf {} +
