# Everything runs in .venv, which each target makes or mends by itself.
PYTHON ?= python3
VENV ?= .venv
# tests at a time; some start four processes of their own
JOBS ?= 2
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test soak lint bench gpu docs clean

demo: $(VENV)/.installed  ## fine-tune the embedded model on the embedded quotes
	$(BIN)/mamba2-train

test: $(VENV)/.dev lint  ## what CI runs
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

soak: $(VENV)/.dev  ## full counts: every shipped kernel compiled for every part
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m slow --timeout 3600

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.bench  ## training beside TRL: BENCHMARKS.md; what kernels move, checkpointing holds
	$(BIN)/python -m mamba2_train.benchmarks out=.
	$(BIN)/python -m mamba2_kernels.benchmark --count --repeats 3
	$(BIN)/python -m mamba2_kernels.compile_report
	$(BIN)/python -m mamba2_train.benchmark

gpu: $(VENV)/.dev  ## what only a GPU can tell, in at most 8 minutes: gpu.json
	$(BIN)/python .ci/gpu gpu.json

docs: $(VENV)/.docs  ## the guides and the reference as pages: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps mistral-common  # 6.6 MB, for the model file of Mistral's tokenizer alone
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(INSTALL) -e '.[docs]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(INSTALL) -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
