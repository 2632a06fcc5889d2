# Each target needs only `python3` and pip. It creates its virtual environment once, and again when pyproject.toml or
# its constraints change.

PYTHON ?= python3
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
PYTEST_ARGS ?=
FAULTS_ARGS ?=

VENV := .venv
FLOOR := .venv-floor
NEWEST := .venv-newest
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-floor test-newest test-distributed test-faults lint format docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-16s %s\n", $$1, $$2}'

# torch is named with the version of constraints.txt, because an unpinned torch may bring gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt "$$(grep '^torch==' constraints.txt)" -e '.[test,integrations,dev,docs]'
	@touch $@

$(FLOOR)/.installed: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python $(PIP_INSTALL) -c constraints-floor.txt "$$(grep '^torch==' constraints-floor.txt)" -e '.[test]'
	@touch $@

# Tests use no network: their data are in the repository, or the test makes them.
demo test test-floor test-newest test-distributed test-faults: export HF_HUB_OFFLINE := 1
demo test test-floor test-newest test-distributed test-faults: export HF_DATASETS_OFFLINE := 1
demo test test-floor test-newest test-distributed test-faults: export HF_EVALUATE_OFFLINE := 1
demo test test-floor test-newest test-distributed test-faults: export TOKENIZERS_PARALLELISM := false
demo test test-floor test-newest test-distributed test-faults: export MPLBACKEND := Agg
# One thread per worker, because the workers already use all cores.
test test-floor test-newest test-distributed test-faults: export OMP_NUM_THREADS := 1

demo: $(VENV)/.installed ## train a small model dense and sparse on the same steps, and compare them (5 minutes)
	$(BIN)/python examples/demo.py

# worksteal keeps neighbouring tests, which share fixtures, on one worker until another worker is idle.
test: $(VENV)/.installed ## run all tests except those of several processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not distributed" $(PYTEST_ARGS)

# torch is the same release in both environments, so what needs nothing but torch (optim, target and the benchmarks)
# cannot differ there: only those of its tests run that meet transformers, schedulefree or torchao.
FLOOR_TESTS := $(addprefix tests/,adapters cli deltas examples exports faults inference layers measurements one_shot rules \
	shrinking sparsity storage trainer test_import.py \
	optim/test_adamw_lp_plain.py optim/test_lp_decay_state.py optim/test_optimizer_names.py)

test-floor: $(FLOOR)/.installed ## run the fast tests of what meets other libraries, with the oldest supported releases
	$(FLOOR)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not distributed" $(FLOOR_TESTS) $(PYTEST_ARGS)

# Nothing is pinned here. On Linux, pip's newest torch is a CUDA build, which takes 6 GB of disk.
$(NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) -U --upgrade-strategy eager torch -e '.[test,integrations]'
	@touch $@

test-newest: $(NEWEST)/.installed ## run the fast tests with the newest release of everything, torch too (6 GB of disk)
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not distributed" $(PYTEST_ARGS)

# DeepSpeed's build needs the installed torch, so it cannot be isolated. Its GPU operators are not built.
$(VENV)/.deepspeed: $(VENV)/.installed
	DS_BUILD_OPS=0 $(BIN)/python $(PIP_INSTALL) --no-build-isolation -c constraints.txt deepspeed
	@touch $@

test-distributed: $(VENV)/.deepspeed ## train under DDP, FSDP2 and DeepSpeed and compare, on several processes of this CPU
	$(BIN)/python -m pytest -q -o faulthandler_timeout=900 tests/distributed $(PYTEST_ARGS)

test-faults: $(VENV)/.installed ## kill training runs at 40 random moments, resume them, and compare bit by bit (12 minutes)
	$(BIN)/python -m tests.faults $(FAULTS_ARGS)

lint: $(VENV)/.installed ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: export NO_MKDOCS_2_WARNING := 1
# With --quiet, mkdocs does not count its warnings, and --strict never fails.
docs: $(VENV)/.installed ## build the documentation into site/; a broken link or name is an error
	$(BIN)/python docs/hooks.py
	$(BIN)/mkdocs build --strict

clean: ## delete the environments, the caches, the demo's output and built files
	rm -rf $(VENV) $(FLOOR) $(NEWEST) demo_output site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
