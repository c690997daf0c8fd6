"""Compressed exports in a stock vLLM, without rlsloth, and in the library compressed-tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.policies import make_groups
from helpers.trained_runs import Export, make_base, make_run, reopened
from rlsloth.cli.main import main
from rlsloth.config import ModelConfig
from rlsloth.exports.check import predictions
from rlsloth.exports.compressed.check import _compress
from rlsloth.exports.compressed.scheme import Scheme, plan_scheme
from rlsloth.exports.compressed.weights import dequantised, fp8, int4, unpack
from rlsloth.exports.compressed.write import read_parts
from rlsloth.exports.stored import Weights
from rlsloth.policy.folder_check import read_json

pytestmark = pytest.mark.slow

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""Heads that vLLM knows, and layers of which vLLM's kernel of four bits takes all."""
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setitem(os.environ, "VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "base", max_position_embeddings=256, **WIDE)
    make_run(tmp_path / "run", base)
    return tmp_path / "run"


def scheme_of(run: Path, to: Any) -> Scheme:
    return plan_scheme(ModelConfig(path=str(run.parent / "base")), to, 64)


def served(folder: Path) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        enable_prefix_caching=False,
    )


def layer_of(llm: Any, name: str) -> Any:
    (found,) = llm.apply_model(lambda model: model.get_submodule(name))
    return found


def check_greedy(llm: Any, model: Any) -> None:
    """Compare log-probs of vLLM's greedy tokens with those of a transformers model."""
    from vllm import SamplingParams

    prompts = [group.prompt_ids for group in make_groups(3)]
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    outs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    gaps = []
    for prompt, out in zip(prompts, outs, strict=True):
        tokens = list(out.outputs[0].token_ids)
        want = predictions(model, torch.tensor(prompt + tokens))[len(prompt) - 1 : -1]
        for at, (token, ours) in enumerate(zip(tokens, want, strict=True)):
            gaps.append(float(out.outputs[0].logprobs[at][token].logprob - ours[token]))
    gap = torch.tensor(gaps).abs()
    print(f"median {gap.median():.2g}, mean {gap.mean():.2g}, max {gap.max():.2g}")
    # An input halfway between two values of FP8 may be rounded either way, which shows in some.
    assert gap.median() <= 1e-4
    assert gap.mean() <= 0.1


def test_fp8_in_vllm(run: Path, export: Export) -> None:
    folder, merged = export(run, "--to", "fp8"), export(run, "--to", "merged", out="merged")
    llm = served(folder)
    layer = layer_of(llm, LAYER)
    assert type(layer.scheme).__name__ == "CompressedTensorsW8A8Fp8"
    stored = read_parts(Weights(folder), LAYER)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(layer.weight.t().float(), stored["weight"].float())
    assert torch.equal(layer.weight_scale, stored["weight_scale"])
    model = reopened(merged)
    _compress(model, Weights(folder), scheme_of(run, "fp8"))
    check_greedy(llm, model)


def test_w4a16_in_vllm(run: Path, export: Export) -> None:
    flags = ("--to", "w4a16", "--group-size", "64")
    folder, merged = export(run, *flags), export(run, "--to", "merged", out="merged")
    llm = served(folder)
    layer = layer_of(llm, LAYER)
    assert type(layer.scheme).__name__ == "CompressedTensorsWNA16"
    assert torch.equal(read_back(layer), dequantised(read_parts(Weights(folder), LAYER)))
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip(
            "vLLM loaded all weights; it cannot compute with them here: its build for CPUs has "
            "the kernel cpu_gemm_wna16 for AVX-512 only, which this processor lacks"
        )
    model = reopened(merged)
    _compress(model, Weights(folder), scheme_of(run, "w4a16"))
    check_greedy(llm, model)


def test_values_chosen_on_texts_in_vllm(run: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{i} and {3 * i} are {4 * i}. " * 8}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = ["--data.train", str(tmp_path / "rows.jsonl"), "--samples", "4", "--tokens", "64"]
    words = ["quantize", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--to", "w4a16", "--group-size", "64", *data]) == 0
    layer = layer_of(served(tmp_path / "out"), LAYER)
    assert type(layer.scheme).__name__ == "CompressedTensorsWNA16"
    stored = dequantised(read_parts(Weights(tmp_path / "out"), LAYER))
    assert torch.equal(read_back(layer), stored)


def read_back(layer: Any) -> torch.Tensor:
    """The weight [O, I] in float32 that vLLM's CPU kernel would read from a layer it has loaded."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        unpack_quantized_values_into_int32,
    )
    from vllm.scalar_type import scalar_types

    if layer.use_w4a8:
        pytest.skip("vLLM has repacked the weights for AMX, in a layout that only its kernel reads")
    scales = layer.weight_scale.float()  # [I / group, O]
    blocks = layer.weight_packed.view(scales.shape[1] // 16, -1, 2)  # 16 outputs in two int32
    rows = blocks.permute(1, 0, 2).reshape(blocks.shape[1], -1)
    codes = unpack_quantized_values_into_int32(rows, scalar_types.uint4b8, 1) - 8
    return (codes * scales.repeat_interleave(len(codes) // len(scales), 0)).t()


@pytest.mark.parametrize("to", ["fp8", "w4a16"])
def test_vllm_reads_the_configuration(to: str, run: Path, export: Export) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    folder = export(run, "--to", to, *(["--group-size", "64"] if to == "w4a16" else []))
    config = CompressedTensorsConfig.from_config(
        read_json(folder / "config.json")["quantization_config"]
    )
    linear = torch.nn.Linear(1, 1)
    found: Any = config.get_scheme_dict(linear, LAYER)
    assert config.get_scheme_dict(linear, "lm_head") is None
    weights, inputs = found["weights"], found["input_activations"]
    if to == "fp8":
        assert (weights.num_bits, weights.type, weights.strategy) == (8, "float", "channel")
        assert (inputs.num_bits, inputs.strategy, inputs.dynamic) == (8, "token", True)
        assert config._is_fp8_w8a8(weights, inputs)
    else:
        assert (weights.num_bits, weights.type, weights.strategy) == (4, "int", "group")
        assert (weights.group_size, weights.symmetric, inputs) == (64, True, None)
        scheme = config._get_scheme_from_parts(weights, inputs, format=found["format"])
        assert type(scheme).__name__ == "CompressedTensorsWNA16"


# --- the library ---------------------------------------------------------------------------------


def random() -> torch.Tensor:
    return torch.randn(6, 256, generator=torch.Generator().manual_seed(0)).bfloat16().float()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_library_reads_the_same_weights_of_four_bits(group: int) -> None:
    pytest.importorskip("compressed_tensors", reason="vLLM brings compressed-tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    parts = int4(random(), group, torch.bfloat16)
    shape = torch.Size(parts["weight_shape"].tolist())
    codes = unpack_from_int32(parts["weight_packed"], 4, shape)
    assert torch.equal(codes.int(), unpack(parts["weight_packed"]))
    assert torch.equal(pack_to_int32(codes, 4), parts["weight_packed"])
    assert torch.equal(dequantize(codes, parts["weight_scale"].float()), dequantised(parts))


def test_the_library_reads_the_same_weights_of_fp8() -> None:
    pytest.importorskip("compressed_tensors", reason="vLLM brings compressed-tensors")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    parts = fp8(random())
    assert torch.equal(dequantize(parts["weight"], parts["weight_scale"]), dequantised(parts))
