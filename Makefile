# make setup | demo | test | test-fast | style | compat | bench; everything runs in .venv
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-fast style compat bench

setup: $(READY)

$(READY): pyproject.toml deploy/cpu/requirements.lock deploy/cpu/vllm-command/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r deploy/cpu/requirements.lock
	$(BIN)/pip install --quiet --no-deps ./deploy/cpu/vllm-command
	$(BIN)/pip install --quiet --no-deps --editable .
	# Tests of the viewer drive a browser; without one they are skipped.
	command -v chromedriver >/dev/null || test "$$(id -u)" != 0 \
	  || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq -y --no-install-recommends chromium chromium-driver) \
	  || echo "no Chromium: tests of the viewer are skipped"
	touch $@

demo: $(READY)
	$(BIN)/dam-vllm demo

# Single-threaded tests share the cores; servers, which take all cores, come one after the other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not e2e" -n 2 --dist worksteal
	$(BIN)/pytest -m e2e

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not (slow or engine or e2e)" -n 2 --dist worksteal

style: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/dam-vllm bench all

# Static: every name of vLLM that we use, in each release that we support.
compat: $(READY)
	$(BIN)/python -m tests.compat installed 0.32 0.33
