# Everything works on a fresh clone with Python >= 3.11 and a shell; .venv is made on first use.
#
#   make demo         train a tiny model on real photographs at TP2 x PP2 on the CPU; results in runs/demo
#   make demo-stages  the same in three stages: connector, LaVer, instruction tuning; results in runs/stages
#   make demo-scaling a scaling study in miniature: 24 runs of four sizes, a law and pictures; in runs/demo-scaling
#   make test-fast    unit tests without processes, signals and disks: some minutes on two cores
#   make test         lint, types and all tests that guard a change: up to twenty minutes on two cores
#   make test-full    the same with the slow tests, and with new examples in property tests
#   make test-engine  what touches Megatron-Core, on its newest version: ten minutes on two cores
#   make test-gpu     the tests that need CUDA
#   make bench        measures a step, teacher, checkpoint and loader on this CPU, in a quarter of an hour; in runs/bench
#
# PYTHON=python3 uses an environment of your own instead of .venv. pip reads its usual settings, so
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS can point it to another build of torch, such as the small CPU one.

.DEFAULT_GOAL := help
.PHONY: help demo demo-stages demo-scaling test-fast test test-full test-engine test-gpu bench lint clean

BASE_PYTHON ?= python3
ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
READY := .venv/installed
endif

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

test-fast: $(READY)
	$(PYTEST) -m "not slow and not processes" tests/unit

test: TESTS := -m "not slow"
test-full: export HYPOTHESIS_PROFILE := search
# Every part runs, whatever the ones before say.
test test-full: $(READY)
	@failed=; \
	make --no-print-directory lint || failed="$$failed lint"; \
	$(PYTEST) $(TESTS) tests/unit || failed="$$failed unit"; \
	$(PYTEST) $(TESTS) tests/distributed || failed="$$failed distributed"; \
	if [ -n "$$failed" ]; then echo "make $@: failed:$$failed"; exit 1; fi; \
	echo "make $@: lint, unit and distributed tests passed"

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

test-gpu: $(READY)
	$(PYTEST) --numprocesses 0 tests/gpu

# BENCH=--quick shows in two minutes that all of it runs.
BENCH ?=
LOADER := $(if $(findstring --quick,$(BENCH)),--samples 600 --repeats 1 --num-workers 0,)
bench: export HF_HUB_OFFLINE := 1
bench: $(READY)
	$(PYTHON) tools/make_demo.py --dir runs/demo
	mkdir -p runs/bench
	$(PYTHON) -m tools.benchmarks.step $(BENCH) --output runs/bench/step.md
	$(PYTHON) -m tools.benchmarks.state $(BENCH) --output runs/bench/state.md
	{ echo "# Loader"; echo; $(PYTHON) -m tools.benchmarks.report; echo; \
		$(PYTHON) tools/benchmarks/loader.py --dir runs/demo $(LOADER); } > runs/bench/loader.md
	@echo "bench: done; see runs/bench/step.md, state.md and loader.md"

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-logo --no-cache

clean:
	rm -rf .venv .engine build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
