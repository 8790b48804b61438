# make setup | demo | test | test-fast | style | compat | bench | image-steps | audit; all in .venv
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-fast style compat bench image-steps audit

setup: $(READY)

$(READY): pyproject.toml $(wildcard deploy/cpu/*.lock) deploy/cpu/vllm-command/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r deploy/cpu/requirements.lock -r deploy/cpu/development.lock
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

# Two workers; those of e2e bind themselves and their servers to a core each.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not e2e" -n 2 --dist worksteal
	$(BIN)/pytest -m e2e -n 2 --dist loadfile

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

# Security: our code, and what is known of the lock's packages (asks the package index).
audit: .cache/audit/.ready
	.cache/audit/bin/bandit --quiet --recursive --configfile pyproject.toml dam_vllm
	.cache/audit/bin/pip-audit --no-deps --disable-pip --requirement deploy/cpu/requirements.lock

.cache/audit/.ready:
	$(PYTHON) -m venv .cache/audit
	.cache/audit/bin/pip install --quiet bandit==1.9.4 pip-audit==2.10.1
	touch $@

# The steps of deploy/cpu/Dockerfile in a clean folder, every package installed anew; then it serves.
image-steps: $(READY)
	DAM_WHOLE_IMAGE=1 $(BIN)/pytest -o tmp_path_retention_policy=failed tests/unit/deploy/test_image_steps.py
