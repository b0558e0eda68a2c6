# make demo    set up, export the embedded model without PyTorch, print its parity table, classify real conversations
# make test    set up with PyTorch, run all fast tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ASSETS := .cache/assets

.PHONY: demo test test-all lint types bench assets package clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"

# Stamps, so that a second run installs nothing.
$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[cpu,export]"
	touch $@

# torch is pinned: a range would pull gigabytes of CUDA packages. TORCH=torch for a GPU build.
TORCH ?= torch==2.13.0
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[cpu,calibrate]" --group dev
	touch $@ $(VENV)/.runtime

demo: $(VENV)/.runtime
	$(BIN)/samescore export refusal-tiny -o bundles/refusal-tiny --variant cpu-int8
	$(BIN)/samescore verify bundles/refusal-tiny
	$(BIN)/samescore classify bundles/refusal-tiny -i demo/conversations.jsonl -o bundles/demo.jsonl
	$(BIN)/python demo/show.py bundles/demo.jsonl

test: $(VENV)/.dev
	$(BIN)/pytest -m "not real and not slow and not packaging and not placement and not emulated"

# Everything: real trained weights (when `make assets` could build them), slow tests, wheels.
test-all: $(VENV)/.dev
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/python tests/types.py

bench: $(VENV)/.dev assets
	$(BIN)/python benchmarks/classifier.py

assets: $(VENV)/.dev
	$(BIN)/python tests/assets/fetch.py $(ASSETS)
	$(BIN)/python tests/assets/build.py $(ASSETS)

package: $(VENV)/.dev
	$(BIN)/pytest -m packaging

clean:
	rm -rf build dist bundles *.egg-info
