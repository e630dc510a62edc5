# make demo        train a small MM1 on this machine and look at what it says of images it has not seen
# make test        install what the tests need and run them
# make check       format, lint, types
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: several processes share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-all check bench gpu-check gpu-bench clean

install: $(STAMP)

# torch first and alone: with it in place nothing pulls another build of it.
$(STAMP): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet megatron-core==0.16.1 -e '.[dev]'
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(BIN)/python -m pip install --quiet nvidia-dali-cuda130 || echo "no DALI here: Pillow decodes"; fi
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py --out demo_output

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow" tests

test-all: $(STAMP)
	$(BIN)/python -m pytest -q tests

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy megatron_mm

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output
