# make demo   sets everything up and runs the demo
# make test   sets everything up and runs the tests (SLOW=1: also the slow ones)
# make site   builds the documentation site into build/site; a broken link is an error
# make dist   builds wheel and sdist into dist, the same bytes for the same commit
# make installed   tries the wheel in an environment without any extra
# make sbom   lists every package of the environment as CycloneDX in build/sbom.json
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SLOW ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo test lint bench docs site dist installed sbom clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | test | lint | bench | docs | site | dist | installed | sbom | clean"

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

# Tools in environments of their own, one per dependency group: they share nothing with the library.
build/%-venv/.ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --group $*
	@touch $@

site: $(READY) build/docs-venv/.ready
	$(BIN)/python -m delible.cli.site build/pages
	build/docs-venv/bin/zensical build --clean --strict
	@echo "Open build/site/index.html"

dist: $(READY)
	rm -rf dist
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} \
	  $(BIN)/python -m build --no-isolation
	@cd dist && sha256sum *

# The wheel in an environment that has nothing but what it needs.
installed: dist
	rm -rf build/installed-venv
	$(PYTHON) -m venv build/installed-venv
	build/installed-venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-compile --constraint requirements.lock dist/*.whl
	build/installed-venv/bin/python .ci/installed.py

sbom: $(READY) build/sbom-venv/.ready
	build/sbom-venv/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library \
	  --output-reproducible --no-validate -o build/sbom.json $(BIN)/python

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests performance examples -name __pycache__ -type d -prune -exec rm -rf {} +
