# make demo    quantise, evaluate and run the model that comes with mxperts
# make test    lint, type-check and test
# make lint    lint and type-check only
# make clean   remove what these commands made
#
# Each does everything on a fresh machine with Python 3.11 or later: it makes .venv and installs what
# constraints.txt pins. Another interpreter, more processes: make test PYTHON=python3.12 WORKERS=8

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/demo
	$(BIN)/mxperts demo --dir mxperts-demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installed again only if what to install has changed. The demo needs no more than users do.
$(VENV)/demo: EXTRA := plot
$(VENV)/dev: EXTRA := dev
$(VENV)/demo $(VENV)/dev: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "mxperts needs Python 3.11 or later; $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA)]'
	@touch $@

clean:
	rm -rf $(VENV) mxperts-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
