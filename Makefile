# make demo   pictures in 4 steps beside the 25-step reference, in demo/
# make test   linter, types and the tests, a real ComfyUI included; make test-slow runs the long ones, make test-all both
# Each makes its own virtual environment once; a second call starts at once.

PYTHON ?= python3
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-all test-floors lint ruff chromium clean

DEMO := .venv-demo
TEST := .venv-test
SOURCES := sun nodes webui scripts tests __init__.py install.py preload.py
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt

# Nothing here may ask a model hub for anything: the models are in the repository.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export PYTHONUTF8 := 1

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

# constraints.txt pins versions that need it; pip's own message would not say so.
CHECK_PYTHON = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "SUN needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }

# torch goes in first and alone, so that nothing after it can choose another build.
$(DEMO)/.installed: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@echo "Installing into $(DEMO) (a few minutes, once)"
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	$(DEMO)/bin/python -m pip install $(PIP_FLAGS) -e ".[cli]"
	@touch $@

$(TEST)/.installed: pyproject.toml constraints.txt tests/comfy/requirements.txt
	$(CHECK_PYTHON)
	@echo "Installing into $(TEST) (a few minutes, once)"
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) -e ".[all,dev]"
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r tests/comfy/requirements.txt
	@touch $@

demo: $(DEMO)/.installed ## four-step pictures beside the 25-step reference, into demo/
	@$(DEMO)/bin/python -m sun demo --out demo

ruff: $(TEST)/.installed
	$(TEST)/bin/ruff check $(SOURCES)
	$(TEST)/bin/ruff format --check $(SOURCES)

lint: ruff ## ruff and mypy
	$(TEST)/bin/mypy

# The browser tests need a Chromium; where there is none and none can be installed, they skip and say so.
chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing Chromium for the browser tests (once)"; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
			chromium chromium-driver >/dev/null; } || echo "Chromium could not be installed; the browser tests skip."; \
	fi

# Two processes, a file to each at a time, in the order of their names: servers, browsers and models that tests share stay
# in one of them.
PYTEST = $(TEST)/bin/python -m pytest -c tests/pytest.ini -n 2 --dist loadfile --no-loadscope-reorder tests

test: ruff chromium ## linter, types and all tests but those marked slow
	.ci/with-types $(TEST)/bin/mypy $(PYTEST) -m "not slow"

test-slow: $(TEST)/.installed chromium ## the others: whole chains, killed processes, further variants
	$(PYTEST) -m slow

test-all: ruff chromium ## every test, with ten times the random inputs and memory over 200 runs
	SUN_FUZZ_EXAMPLES=2000 SUN_MEMORY_RUNS=200 .ci/with-types $(TEST)/bin/mypy $(PYTEST)

FLOORS := .venv-floors

# The oldest versions that pyproject.toml allows: what is read from strangers, the maths, the pipelines.
$(FLOORS)/.installed: pyproject.toml tests/floors.txt
	$(CHECK_PYTHON)
	@echo "Installing into $(FLOORS) (a few minutes, once)"
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/floors.txt -e ".[train]" pytest hypothesis
	@touch $@

test-floors: $(FLOORS)/.installed ## the core and the command line with the oldest versions allowed
	$(FLOORS)/bin/python -m pytest -c tests/pytest.ini tests/core tests/common tests/pipelines tests/pictures/test_recipes.py tests/cli/test_terminal.py

clean: ## remove the environments, caches and demo pictures
	rm -rf $(DEMO) $(TEST) $(FLOORS) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
