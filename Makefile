# make demo        train a small MM1 on this machine and look at what it says of images it has not seen
# make test        install what the tests need and run them
# make test-all    the slow tests too
# make test-te     of these, those of Transformer Engine's layers
# make test-matrix the whole suite on the oldest and the newest supported megatron-core
# make test-engines what differs between versions of megatron-core, on all of them
# make test-faults  a small run that meets one fault after another ends as an undisturbed one does
# make test-isa    the tests that compare numbers, with the kernels of older and newer processors in turn
# make test-transformers   exports in old and new versions of transformers, and in an inference engine
# make nightly     all of it: test-all, test-isa, check; where Python 3.12 is, test-matrix
# make check       format, lint, types
# make bench       benchmarks that need no GPU
# make gpu-check   on a machine with a GPU: Transformer Engine, FP8, DALI and the fused optimizer against plain PyTorch
# make gpu-bench   on a machine with a GPU, in 8 minutes: step time, TFLOP/s, MFU and memory; DALI's rates; routed experts
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Transformer Engine's Python (one megabyte), which the tests run over kernels of their own: outside the environment, where nothing else finds it.
TE_PYTHON := build/transformer_engine
# One thread a process: several processes share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-all test-faults test-te test-matrix test-newest test-engines test-isa test-transformers nightly check bench gpu-check gpu-bench clean

install: $(STAMP)

# torch first and alone: with it in place nothing pulls another build of it.
$(STAMP): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet megatron-core==0.16.1 -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TE_PYTHON)/2.11.0 transformer-engine==2.11.0 einops \
	    || echo "no transformer-engine here: its tests are skipped"
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(BIN)/python -m pip install --quiet nvidia-dali-cuda130 || echo "no DALI here: Pillow decodes"; fi
	touch $@

DEMO_OUT ?= demo_output
demo: $(STAMP)
	$(BIN)/python tools/demo.py --out $(DEMO_OUT)

# Two test files at a time, which is what two cores carry (many tests start several processes of their own): WORKERS=4 on a larger machine.
WORKERS ?= 2
PYTEST = python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The longest files first, so that no worker is left alone with one of them.
LONGEST := tests/training tests/parallel tests/models tests/run tests/test_golden_runs.py
test: $(STAMP)
	$(BIN)/$(PYTEST) -m "not slow" $(LONGEST) tests

test-all: $(STAMP)
	$(BIN)/$(PYTEST) tests

# Killed, stopped and hanging processes, a full disk, a damaged checkpoint, a second run, in a random order (SEED=2 for another one).
SEED ?= 1
test-faults: $(STAMP)
	$(BIN)/python tools/fault_drill.py --out build/faults --seed $(SEED)
	$(BIN)/python tools/fault_drill.py --out build/faults --seed $(SEED) --faults 4 --change-layout

# What compares numbers, with the kernels of SSE4, AVX2 and AVX-512: no result may depend on them. Those that the processor lacks are skipped.
ISA_TESTS := tests/models tests/families tests/platform tests/test_golden_runs.py tests/parallel/test_gradients.py tests/parallel/test_images.py \
	tests/training/test_optimizer.py tests/conversion/test_hf_model.py
test-isa: $(STAMP)
	$(BIN)/python tools/test_isa.py $(ISA_TESTS)

# Exports in other versions of transformers than the installed one, each in a folder of its own, and a decoder in an inference engine.
# The oldest is the least that pyproject.toml asks for; tokenizers and huggingface-hub are those of its time.
OLDEST_TRANSFORMERS := 4.50.0
build/transformers/$(OLDEST_TRANSFORMERS):
	$(BIN)/python -m pip install --quiet --no-deps --target $@ transformers==$(OLDEST_TRANSFORMERS) tokenizers==0.21.1 huggingface-hub==0.30.2 requests urllib3 idna certifi charset_normalizer
# The last of version 4, which loads attention in another way than both.
LAST_TRANSFORMERS_4 := 4.57.6
build/transformers/$(LAST_TRANSFORMERS_4):
	$(BIN)/python -m pip install --quiet --no-deps --target $@ transformers==$(LAST_TRANSFORMERS_4) tokenizers==0.22.2 huggingface-hub==0.36.0 requests urllib3 idna certifi charset_normalizer
build/transformers/newest:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ transformers tokenizers huggingface-hub
	mv $@ build/transformers/$$(ls -d $@/transformers-*.dist-info | sed 's/.*transformers-\(.*\).dist-info/\1/')
build/engines:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ ctranslate2
test-transformers: $(STAMP) build/transformers/$(OLDEST_TRANSFORMERS) build/transformers/$(LAST_TRANSFORMERS_4) build/engines
	test -n "$$(ls build/transformers | grep -v -e $(OLDEST_TRANSFORMERS) -e $(LAST_TRANSFORMERS_4))" || $(MAKE) build/transformers/newest
	$(BIN)/python -m pytest -q tests/conversion/test_loading.py tests/conversion/test_engines.py

# For the night, before a release, and after a change of torch, megatron-core or Transformer Engine (CONTRIBUTING.md).
nightly: test-all test-isa check
	@if [ -x $(VENV312)/bin/python ] || [ -n "$(PYTHON312)" ]; then \
	    $(MAKE) test-newest; \
	else \
	    echo "no python3.12 here: megatron-core 0.19 and Transformer Engine 2.20 are not tested (set PYTHON312=... or VENV312=...)"; \
	fi

# Everything that the tests have of Transformer Engine: its own Python over kernels written in PyTorch (tests/support/te), the slow ones too.
test-te: $(STAMP)
	$(BIN)/$(PYTEST) tests/models/test_te.py tests/models/test_te_options.py tests/models/test_te_spread.py tests/tools/test_gpu_tools.py

# The whole suite on two engines: the one of `make install`, and megatron-core 0.19 with Python 3.12 (VENV312=... names an environment that has
# it; PYTEST_ADDOPTS="-k ..." takes some of the tests).
PYTHON312 ?= $(shell command -v python3.12)
VENV312 ?= .venv312
$(VENV312)/bin/python:
	@test -n "$(PYTHON312)" || { echo "make: error: no python3.12 here: set PYTHON312=..." >&2; exit 2; }
	$(PYTHON312) -m venv $(VENV312)
	$@ -m pip install --quiet torch==2.11.0
	$@ -m pip install --quiet megatron-core==0.19.2 -e '.[dev]'
	$@ -m pip install --quiet --no-deps --target $(TE_PYTHON)/2.20.2 transformer-engine==2.20.2 einops

test-matrix: test-all test-newest

test-newest: | $(VENV312)/bin/python
	PYTHONPATH=. $(VENV312)/bin/$(PYTEST) tests

# Other versions of megatron-core, each in a folder of its own before the installed one, and a table of what runs: every family in several
# processes, resumed in another layout and exported, with the losses that it should have; a plan; and the tests of what differs between them.
# A newer one: make test-engines ENGINES311= ENGINES312=0.20.0
ENGINES311 ?= 0.16.0
ENGINES312 ?= 0.17.0,0.17.1,0.18.0,0.18.2,0.19.0
ENGINE_TESTS := tests/platform tests/test_golden_runs.py tests/training/test_options.py tests/training/test_kernels.py tests/models/test_te.py
test-engines: $(STAMP) | $(VENV312)/bin/python
	$(BIN)/python tools/try_engines.py $(BIN)/python=$(ENGINES311) $(VENV312)/bin/python=$(ENGINES312) --tests $(ENGINE_TESTS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Benchmarks that need no GPU; each prints its ratios.
bench: $(STAMP)
	test -d build/bench_data || $(BIN)/python -m megatron_mm prepare demo --out build/bench_data
	$(BIN)/python benchmarks/plan_time.py
	$(BIN)/python benchmarks/start_time.py
	$(BIN)/python benchmarks/micro_batch_balance.py
	$(BIN)/python benchmarks/padding.py
	$(BIN)/python benchmarks/spread_encoder.py
	$(BIN)/python benchmarks/checkpoint_save.py
	$(BIN)/python benchmarks/checkpoint_load.py
	$(BIN)/python benchmarks/restart_time.py
	$(BIN)/python benchmarks/loader_throughput.py
	$(BIN)/python benchmarks/prepare_rate.py
	$(BIN)/python benchmarks/long_texts.py
	$(BIN)/python benchmarks/trainer_overhead.py --data build/bench_data
	$(BIN)/python benchmarks/monitoring.py --data build/bench_data
	$(BIN)/python benchmarks/moe_step.py --data build/bench_data
	$(BIN)/python benchmarks/frozen_stages.py --data build/bench_data
	$(BIN)/python benchmarks/conversion_speed.py
	$(BIN)/python benchmarks/routed_experts.py
	$(BIN)/python benchmarks/monolithic.py
	$(BIN)/python benchmarks/generation.py

# On a machine with a GPU, in an environment that has torch's CUDA build, Transformer Engine and DALI (a container, say).
GPU_PYTHON ?= python3
gpu-check:
	PYTHONPATH=. PYTHONWARNINGS=ignore $(GPU_PYTHON) tools/gpu_check.py

gpu-bench:
	PYTHONPATH=. PYTHONWARNINGS=ignore $(GPU_PYTHON) benchmarks/gpu_bench.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output
