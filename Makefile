# image     a picture from a prompt, by the model that ships with us
# test      the quick tests        test-all  also the slow ones        gpu  the GPU tests, with the system's Python
# lint      ruff and pyright       pictures  draw what docs/ shows and measure it (minutes)
# tabletop  train the shipped model from nothing (hours; resumes where it stopped)

PYTHON ?= python3
PROMPT ?= a large shiny red sphere on a wooden table
OUT ?= out/picture.png
WORKERS ?= auto
PARTS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Training by two processes of one thread each, which are faster than one of two threads.
TWICE := ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 --rdzv-backend c10d \
    --rdzv-endpoint localhost:0 -m
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses=8 --dist=loadfile --durations=15

export PROMPT OUT

.DELETE_ON_ERROR:
.PHONY: help image test test-all lint gpu pictures tabletop

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

image: $(VENV)/run.stamp
	@mkdir -p "$$(dirname "$$OUT")"
	$(BIN)/sdkit txt2img "$$PROMPT" --out "$$OUT"
	@realpath "$$OUT"

test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/test.stamp
	$(PYTEST) -m "not gpu"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Checks, tests and timings with the packages that the machine with the GPU has: nothing is installed there. PARTS picks
# some, see bench/gpu.py; results go to OUT, where it is given.
gpu: OUT := $(if $(filter file,$(origin OUT)),,$(OUT))
gpu:
	PYTHONPATH=".:kernels:$$PYTHONPATH" $(PYTHON) -m bench.gpu $(if $(PARTS),--parts $(PARTS))

pictures: $(VENV)/run.stamp
	$(BIN)/python docs/pictures.py
	$(BIN)/python -m docs.lessons
	$(BIN)/python -m finetune.pretrain.editing

tabletop: $(VENV)/test.stamp
	$(BIN)/python -m finetune.pretrain.autoencoder --crop 64
	$(TWICE) finetune.pretrain.clip
	$(TWICE) finetune.pretrain.noise_predictor
	$(TWICE) finetune.pretrain.sides
	$(TWICE) finetune.pretrain.probe
	cp -R build/tabletop/sides/model/. sdkit/models/tabletop/
	$(BIN)/python -m finetune.pretrain.evaluate
	$(TWICE) finetune.pretrain.depth_estimator
	$(TWICE) finetune.pretrain.companion depth
	$(TWICE) finetune.pretrain.companion inpaint
	$(TWICE) finetune.pretrain.latent_classifier

# One virtual environment, filled as far as the target needs it: run < test < dev. torch goes first and by its exact
# version, so that pip takes the build that the machine offers and never replaces it.
$(VENV)/pip.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else \
	    f"Python 3.11 or later is needed, $(PYTHON) is {v}; name another one: make PYTHON=python3.12")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) "$$(grep ^torch== constraints.txt)"
	@touch $@

$(VENV)/run.stamp: $(VENV)/pip.stamp pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/pip.stamp pyproject.toml
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/run.stamp

$(VENV)/dev.stamp: $(VENV)/pip.stamp pyproject.toml
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/run.stamp $(VENV)/test.stamp
