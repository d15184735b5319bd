# make demo   install without PyTorch into .venv and measure what is here
# make test   install with the development extras into .venv and run the tests
# make lint   ruff
# make clean  remove .venv and everything built
#
# Needs Python 3.10 or later (PYTHON=python3.12 names another one), make and a C compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# A stamp is older than what it depends on only if the installation has to be redone.
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.PHONY: demo test lint clean

demo: $(BASE)
	$(BIN)/im2win bench

test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(DEV)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or later is needed, this is {v.major}.{v.minor}")'
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml | $(BIN)/python
	$(PIP) -e .
	touch $@

$(DEV): pyproject.toml constraints-dev.txt | $(BIN)/python
	$(PIP) -c constraints-dev.txt -e '.[dev,torch,onnx]'
	touch $@ $(BASE)
