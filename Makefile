# make setup | demo | test | style | bench; everything runs in .venv
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test style bench

setup: $(READY)

$(READY): pyproject.toml deploy/cpu/requirements.lock deploy/cpu/vllm-command/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r deploy/cpu/requirements.lock
	$(BIN)/pip install --quiet --no-deps ./deploy/cpu/vllm-command
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: $(READY)
	$(BIN)/dam-vllm demo

test: $(READY)
	$(BIN)/pytest

style: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/dam-vllm bench all
