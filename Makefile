# make demo   set up, compile the bundled tiny MoE, show its plan, let it write a paragraph
# make test   set up, lint, type-check, run the test suite
# make check  lint and types alone
# make clean  remove what the others made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo test check clean

$(VENV)/base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/test: $(VENV)/base
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/base
	mkdir -p $(DEMO)
	$(BIN)/hmc compile examples/tiny-kjv -o $(DEMO)/tiny.hmp
	$(BIN)/hmc show $(DEMO)/tiny.hmp
	$(BIN)/hmc run $(DEMO)/tiny.hmp -p "And it came to pass" -n 120 --seed 7

check: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n 2

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
