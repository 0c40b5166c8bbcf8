# Every target makes what it needs: a virtual environment in .venv, the packages, the Triton binary.
# Nothing is installed outside of .venv. Running a target again installs nothing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IMAGE ?=
PYTEST_ARGS ?=
PACKAGES := client/matteserve_client server/matteserve_server export/matteserve_export bench/matteserve_bench

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-slow lint wheel clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.server ## Cut out a picture on a real Triton; IMAGE=photo.jpg for your own
	$(BIN)/matteserve demo $(IMAGE)

serve: $(VENV)/.server ## Serve model_repository/ on 127.0.0.1:8001
	$(BIN)/matteserve serve

test: $(VENV)/.dev ## Run the tests, with a real Triton
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.dev ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)

wheel: $(VENV)/.dev ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## Remove what the targets made
	rm -rf $(VENV) dist out

$(VENV)/bin/python:
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# The demonstration needs the server's extra only: no torch.
$(VENV)/.server: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing matteserve[server] into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[server]"
	$(BIN)/matteserve install-triton
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing matteserve with everything that the tests need into $(VENV); torch makes this take a minute or two"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[server,fast,export,rtx,bench,dev,parity]"
	@# The extra [eval], but with our numpy: pysodmetrics 1.6 wants one below 2.3.5, and what is used of it needs none.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"opencv-python-headless<5" scikit-image "scikit-learn<2" scipy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps "pysodmetrics<2"
	$(BIN)/matteserve install-triton
	@touch $@ $(VENV)/.server
