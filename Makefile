# make demo    see it work: trains a small character model through a long sequence
# make demo-jax  the same in JAX: finds the source of a tsunami from tide gauges
# make test    every check: lint, format, types, import layers, tests
# make test-slow  the tests that `make test` leaves out, which take long: kills, campaigns, 200 optimiser steps
# make bench   the measured figures of the README (long; needs a quiet machine)
# make bench-gpu  the figures of a CUDA device, on a machine that has one (docs/gpu.md)
# Each needs only Python 3.11 or newer with pip, and make.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
BENCH_STAMP := .venv/installed-bench

.PHONY: help venv demo demo-jax test test-slow lint types layers pytest pytest-edges pytest-rest format bench bench-gpu clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable '.[torch,jax,cli,devito,dev]' scipy
	touch $@

demo: venv
	$(BIN)/python examples/char_lstm.py

demo-jax: venv
	$(BIN)/python examples/tsunami.py --picture tsunami.png

test: lint types layers pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy src

layers: venv
	$(BIN)/lint-imports

# Two halves side by side: many tests wait, for a killed process, a slow disk or a thread.  Each has a directory for
# temporary files of its own, in which it looks for what tests leave behind.
pytest: venv
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target pytest-edges pytest-rest

pytest-edges: venv
	export TMPDIR=$$(mktemp -d) && $(BIN)/python -m pytest -m "not slow" tests/edges tests/torch; \
	    code=$$?; rm -rf "$$TMPDIR"; exit $$code

pytest-rest: venv
	export TMPDIR=$$(mktemp -d) && $(BIN)/python -m pytest -m "not slow" --ignore=tests/edges --ignore=tests/torch; \
	    code=$$?; rm -rf "$$TMPDIR"; exit $$code

test-slow: venv
	$(BIN)/python -m pytest -m slow

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt checkpoint-schedules pyrevolve
	touch $@

bench: $(BENCH_STAMP)
	for what in lstm stencil executor planning; do $(BIN)/python -m benchmarks.overhead $$what || exit; done
	$(BIN)/python -m benchmarks.stencil
	$(BIN)/python -m benchmarks.baselines
	for what in prediction noise observing; do $(BIN)/python -m benchmarks.$$what || exit; done
	$(BIN)/python -m benchmarks.devito_acoustic 2d 3d
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.jax_scan
	$(BIN)/python -m benchmarks.timeline
	$(BIN)/python -m benchmarks.figures

bench-gpu: venv
	$(BIN)/python -m benchmarks.gpu
	if command -v compute-sanitizer; then \
	    compute-sanitizer --tool memcheck --error-exitcode 1 \
	        $(BIN)/python -m benchmarks.gpu --quick --only bits delays --dry; \
	fi

clean:
	rm -rf .venv build src/longtape.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
