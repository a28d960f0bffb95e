# make demo   set up, compile the bundled tiny MoE, show its plan, let it write a paragraph
# make test   set up, lint, type-check, run the test suite
# make test-all  the same with the slow tests, all seeds and requests, and the kernels of CPUs other
#             than this one (emulated)
# make test-eval  lm-eval's client against a live server, with lm-eval installed as well
# make test-recipes  docs/recipes.md with the neighbours' packages, installed as well
# make check  lint and types alone
# make gpu-check  on a machine with a GPU: parity, speed and predictions in under 10 minutes, one
#             table; GPU_PYTHON=python3 takes the machine's own packages, GPU_ARGS="--devices host"
#             lets the CPU play the GPU
# make gpu-fake  without a GPU: the CUDA path on libraries that play CUDA's, under a real CUDA build
#             of PyTorch (5 GB in .venv-cuda; gcc): what holds of it, one table;
#             FAKE_ARGS="--only order --sm 120" does a part
# make numa-check  where memory lies on a machine of several NUMA nodes, page by page; elsewhere
#             NUMA_VM names a command that runs another on such a machine with this one's files
# make clean  remove what the others made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= $(BIN)/python
CUDA := .venv-cuda
DEMO := build/demo

.PHONY: demo test test-all test-eval test-recipes check gpu-check gpu-fake numa-check clean

$(VENV)/base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/test: $(VENV)/base
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/eval: $(VENV)/test
	$(BIN)/pip install --quiet --editable ".[test,eval]"
	touch $@

$(VENV)/recipes: $(VENV)/test
	$(BIN)/pip install --quiet --editable ".[test,recipes]"
	touch $@

$(CUDA)/base: pyproject.toml
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/pip install --quiet "torch==2.11.*" pytest
	$(CUDA)/bin/pip install --quiet --editable .
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

# children of the tests find what the first process compiled, whatever the environment says
test: check
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist worksteal

test-all: check
	HMC_TEST_SEEDS=1000 HMC_TEST_REQUESTS=3000 HMC_TEST_EMULATE=1 $(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow"

test-eval: $(VENV)/eval
	$(BIN)/pytest tests/serve/test_lm_eval.py

test-recipes: $(VENV)/recipes
	$(BIN)/pytest tests/recipes -m slow

gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/base)
	PYTHONPATH=tests $(GPU_PYTHON) -m gpu.check $(GPU_ARGS)

gpu-fake: $(CUDA)/base
	PYTHONPATH=tests:tests/runtime $(CUDA)/bin/python -m gpu.fake $(FAKE_ARGS)

numa-check: $(VENV)/base
	PYTHONPATH=.:tests NUMA_VM="$(NUMA_VM)" $(BIN)/python -m numa.check

clean:
	rm -rf $(VENV) $(CUDA) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
