# Everything works on a fresh clone with Python >= 3.11 and a shell; .venv is made on first use.
#
#   make demo         train a tiny model on real photographs at TP2 x PP2 on the CPU; results in runs/demo
#   make demo-stages  the same in three stages: connector, LaVer, instruction tuning; results in runs/stages
#   make demo-scaling a scaling study in miniature: 24 runs of four sizes, a law and pictures; in runs/demo-scaling
#   make demo-ablation  the paper's ablation in miniature: seven arms, four seeds; an hour and more; in runs/ablation
#   make test-fast    unit tests without processes, signals and disks: some minutes on two cores
#   make test         lint, types and all tests that guard a change: up to twenty minutes on two cores
#   make test-full    the same with the slow tests, and with new examples in property tests
#   make test-faults  faults put into runs of several processes, at length: twenty minutes on two cores
#   make test-engine  what touches Megatron-Core, on its newest version: ten minutes on two cores
#   make bench        measures a step, attention, checkpoint and loader on this CPU, in a quarter of an hour; in runs/bench
#   make gpu          tests and benchmarks on a GPU in pieces of at most nine minutes, gpu-1 to gpu-9; in runs/gpu
#   make gpu-wheels   downloads what make gpu needs besides torch and transformers, for a machine without internet
#
# PYTHON=python3 uses an environment of your own instead of .venv. pip reads its usual settings, so
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can point it to another build of torch, such as the small CPU one.

.DEFAULT_GOAL := help
.PHONY: help demo demo-stages demo-scaling demo-ablation test-fast test test-full test-faults test-engine bench lint clean \
	gpu gpu-wheels test-gpu bench-gpu

BASE_PYTHON ?= python3
ifeq ($(origin PYTHON), undefined)
GPU_PYTHON ?= python3
PYTHON := .venv/bin/python
READY := .venv/installed
endif
GPU_PYTHON ?= $(PYTHON)

export OMP_NUM_THREADS ?= 1
# Two at a time, file by file. Distributed tests start four processes for each of the two, which mostly wait.
PYTEST := HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q --numprocesses 2 --dist loadfile
# Python 3.11 has the last Megatron-Core that supports it, later ones have the newest.
CONSTRAINTS = $(shell $(BASE_PYTHON) -c 'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-py312.txt")')
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
DEMO := $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node 4 examples/pretrain_laver.sh \
	--config examples/demo.yaml

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

.venv/installed: setup.py constraints.txt constraints-py312.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; name one with BASE_PYTHON=")'
	@echo "making .venv (torch is large: this can take minutes)"
	$(BASE_PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

demo: $(READY)
	$(PYTHON) tools/make_demo.py --dir runs/demo
	@echo "demo: starting over; the results of an earlier demo are removed, its model and shards are kept"
	rm -rf runs/demo/checkpoints runs/demo/*.jsonl runs/demo/run_summary.json runs/demo/curves.png
	$(DEMO) --exit-interval 45
	@echo "demo: the same command again goes on from the checkpoint"
	$(DEMO)
	@echo "demo: done; see runs/demo/curves.png and runs/demo/metrics.jsonl"

demo-stages: $(READY)
	$(PYTHON) tools/make_demo.py --dir runs/demo
	@echo "demo-stages: starting over; the results of an earlier call are removed"
	rm -rf runs/stages
	NPROC_PER_NODE=4 $(PYTHON) tools/train_stages.py \
		examples/demo_stages/stage1_align.yaml examples/demo_stages/stage2_laver.yaml \
		examples/demo_stages/stage3_instruct.yaml --log-interval 5 --compare-weights

demo-scaling: $(READY)
	$(PYTHON) tools/make_demo.py --dir runs/demo-scaling --num-train-samples 8192 --models 32x2 48x3 64x4 96x4
	@echo "demo-scaling: starting over; the runs of an earlier call are removed"
	rm -rf runs/demo-scaling/sweep runs/demo-scaling/law
	$(PYTHON) tools/make_sweep.py --base examples/demo_scaling.yaml --tokens 2e5 4e5 8e5 \
		--models $(foreach size,32x2 48x3 64x4 96x4,runs/demo-scaling/model_$(size)) \
		--lr-exponent 0.25 --lr-warmup-share 0.1 --output runs/demo-scaling/sweep
	bash runs/demo-scaling/sweep/run.sh
	$(PYTHON) tools/fit_scaling_law.py --registry runs/demo-scaling/sweep/runs --arm-by laver \
		--output runs/demo-scaling/law

# Nothing is removed: the same command goes on where it was stopped, and a finished run is not trained again. Remove
# runs/ablation after a change of the commands or of examples/ablation/.
ABLATION := runs/ablation
LAVER := $(PYTHON) -m laver_megatron
demo-ablation: $(READY)
	[ -d $(ABLATION)/tasks ] || $(LAVER) make-tasks --train 24000 --valid 1600 --difficulty 1 2 --output $(ABLATION)/tasks
	$(LAVER) ablation-parts --dir $(ABLATION)
	$(LAVER) train --config examples/ablation/base.yaml
	$(LAVER) train --config examples/ablation/align.yaml
	[ -d $(ABLATION)/sweep ] || $(LAVER) sweep --models examples/ablation/cpu.yaml --arms examples/ablation/arms.yaml \
		--iterations 1200 --seeds 1 2 3 4 --output $(ABLATION)/sweep
	@# Seed by seed: where it is stopped, there are whole sets of arms to compare.
	tail -n +2 $(ABLATION)/sweep/manifest.csv | sort -s -t, -k6,6n | cut -d, -f1 | xargs -P 2 -n 1 bash $(ABLATION)/sweep/run.sh
	$(LAVER) arm-table $(ABLATION)/sweep --output $(ABLATION)

test-fast: $(READY)
	$(PYTEST) -m "not slow and not processes" tests/unit

test: TESTS := -m "not slow and not faults"
test-full: TESTS := -m "not faults"
test-full: export HYPOTHESIS_PROFILE := search
# Every part runs, whatever the ones before say. Files with few tests are the long ones among the distributed tests:
# by default they would come last, where one process may be left alone with them.
test test-full: $(READY)
	@failed=; \
	make --no-print-directory lint || failed="$$failed lint"; \
	$(PYTEST) $(TESTS) tests/unit || failed="$$failed unit"; \
	$(PYTEST) --no-loadscope-reorder $(TESTS) tests/faults tests/distributed || failed="$$failed distributed"; \
	if [ -n "$$failed" ]; then echo "make $@: failed:$$failed"; exit 1; fi; \
	echo "make $@: lint, unit and distributed tests passed"

# One at a time: they wait for timeouts, and some of them measure.
test-faults: $(READY)
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -m faults tests/unit tests/distributed tests/faults

# What goes through Megatron-Core: model and layers, gradients, schedules, optimizer, checkpoints and conversion. Data,
# encoders, configuration and tools know nothing of its version. Left out for time: layouts and switches that repeat the
# same calls with other arguments (test_encoders, test_stages, test_two_agents and the like).
ENGINE_TESTS := tests/unit/model tests/unit/runtime tests/unit/objective/test_sharded.py \
	tests/unit/convert/test_conversion.py tests/unit/convert/test_conversion_encoders.py \
	tests/unit/planning/test_dry_run.py tests/unit/planning/test_sharding.py \
	$(addprefix tests/distributed/test_,engines.py frozen_checkpoint.py checkpoint.py conversion.py oracle.py \
	layout_invariance.py bf16.py teacher.py freeze.py recompute.py parity.py)

# Python 3.11 gets a copy of it for the tests; later ones have it anyway.
test-engine: $(READY)
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
		make --no-print-directory .engine/installed && export PYTHONPATH="$(CURDIR)/.engine"; \
	fi; \
	$(PYTHON) -c 'import laver_megatron, megatron.core; print("Megatron-Core", megatron.core.__version__)' && \
	$(PYTEST) -m "not slow" $(ENGINE_TESTS)

# Its wheel does not declare to support Python 3.11, but runs there.
.engine/installed: constraints-py312.txt
	rm -rf .engine
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
		--python-version 3.12 --only-binary=:all: --target .engine $$(grep ^megatron-core== constraints-py312.txt)
	@touch $@

# BENCH=--quick shows in two minutes that all of it runs.
BENCH ?=
LOADER := $(if $(findstring --quick,$(BENCH)),--samples 600 --repeats 1 --num-workers 0,)
bench: export HF_HUB_OFFLINE := 1
bench: $(READY)
	$(PYTHON) tools/make_demo.py --dir runs/demo
	mkdir -p runs/bench
	$(PYTHON) -m tools.benchmarks.step $(BENCH) --output runs/bench/step.md
	$(PYTHON) -m tools.benchmarks.attention $(BENCH) --output runs/bench/attention.md
	$(PYTHON) -m tools.benchmarks.state $(BENCH) --output runs/bench/state.md
	$(PYTHON) -m tools.benchmarks.loader --dir runs/demo $(LOADER) --output runs/bench/loader.md
	@echo "bench: done; see runs/bench/step.md, attention.md, state.md and loader.md"

# --- on a GPU ------------------------------------------------------------------------------------------
#
# GPU_PYTHON has torch >= 2.10 with CUDA, transformers >= 5 and what these bring. What is needed beyond them comes from
# .wheels, which `make gpu-wheels` fills where there is internet, and goes to .gpu: GPU_PYTHON stays as it is.

OUT ?= runs/gpu
GPU_PYTHON_VERSION ?= 3.12
# SciPy and matplotlib are left out: only plots and studies read them. An older pyarrow is 15 MB smaller.
GPU_WHEELS = $(shell grep -E '^(megatron-core|webdataset|braceexpand|xxhash|psutil|pillow)==' constraints-py312.txt) \
	$(shell grep -E '^(pytest|pluggy|iniconfig|hypothesis|sortedcontainers)==' constraints-py312.txt) pyarrow==18.1.0

gpu-wheels:
	rm -rf .wheels
	$(BASE_PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version $(GPU_PYTHON_VERSION) --dest .wheels $(GPU_WHEELS)
	@du -sm .wheels | awk '{ print "gpu-wheels: " $$1 " MB in .wheels"; exit $$1 > 60 }'

.gpu/installed: constraints-py312.txt
	@test -d .wheels || { echo ".wheels is missing: run make gpu-wheels on a machine with internet, and bring it"; exit 1; }
	rm -rf .gpu
	$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links .wheels \
		--target .gpu $(GPU_WHEELS)
	@touch $@

# Each piece ends within its limit and leaves its log and its results in OUT, whatever becomes of the others.
# Without CUDA the tests are skipped, and this shows that all of it runs:
#   make gpu GPU_BENCH="--device cpu --quick" SHAPE=tiny LENGTHS=128 WORKERS=0
GPU_LIMIT ?= 540
GPU_BENCH ?= --device cuda --bf16
GPU_PIECES := gpu-1 gpu-2 gpu-3 gpu-4 gpu-5 gpu-6 gpu-7 gpu-8 gpu-9
.PHONY: $(GPU_PIECES)

gpu-1: COMMAND = pytest -v --durations 10 --junitxml $(OUT)/$@.xml tests/gpu/test_attention.py
gpu-2: COMMAND = pytest -v --durations 10 --junitxml $(OUT)/$@.xml tests/gpu --ignore tests/gpu/test_attention.py
gpu-3: COMMAND = tools.benchmarks.attention $(GPU_BENCH) --shapes $(SHAPE) --lengths $(LENGTHS) --output $(OUT)/$@.md
gpu-3: SHAPE := 0.5b 7b-width
gpu-3: LENGTHS := 4096 8192
gpu-4 gpu-5 gpu-6 gpu-7: COMMAND = tools.benchmarks.step $(GPU_BENCH) --one-at-a-time --shapes $(SHAPE) --output $(OUT)/$@.md
gpu-4: SHAPE := 0.5b
gpu-5: SHAPE := 1.5b
gpu-6: SHAPE := 7b-width
gpu-7: SHAPE := 72b-width
gpu-8: COMMAND = tools.benchmarks.state $(GPU_BENCH) --shape $(SHAPE) --rounds 2 --output $(OUT)/$@.md
gpu-8: SHAPE := 0.5b
gpu-9: COMMAND = tools.benchmarks.loader --made-up --num-workers $(WORKERS) --repeats 3 --output $(OUT)/$@.md
gpu-9: WORKERS := 0 4 8
# PYTEST_DISABLE_PLUGIN_AUTOLOAD: plugins of GPU_PYTHON may be made for another pytest.
$(GPU_PIECES): .gpu/installed
	@mkdir -p $(OUT)
	@PYTHONPATH="$(CURDIR)/.gpu:$(CURDIR)" HF_HUB_OFFLINE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
		timeout $(GPU_LIMIT) $(GPU_PYTHON) -m $(COMMAND) > $(OUT)/$@.log 2>&1; status=$$?; \
	if [ $$status = 0 ]; then echo "$@: done"; else tail -n 5 $(OUT)/$@.log; fi; \
	if [ $$status = 124 ]; then echo "$@: ended after $(GPU_LIMIT) s; see $(OUT)/$@.log"; \
	elif [ $$status != 0 ]; then echo "$@: failed; see $(OUT)/$@.log"; fi; exit $$status

# One after the other; the others run where one fails.
gpu: PIECES := $(GPU_PIECES)
test-gpu: PIECES := gpu-1 gpu-2
bench-gpu: PIECES := gpu-3 gpu-4 gpu-5 gpu-6 gpu-7 gpu-8 gpu-9
gpu test-gpu bench-gpu: .gpu/installed
	@failed=; for piece in $(PIECES); do $(MAKE) --no-print-directory $$piece || failed="$$failed $$piece"; done; \
	if [ -n "$$failed" ]; then echo "make $@: failed:$$failed"; exit 1; fi; echo "make $@: results in $(OUT)"

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-logo --no-cache

clean:
	rm -rf .venv .engine .gpu .wheels build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
