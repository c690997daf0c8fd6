"""Merged weights: they equal the base model with its adapter, and wrong ones are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from helpers.trained_runs import (
    Export,
    make_base,
    make_run,
    micro_batch,
    plain_logprobs,
    reopened,
    rewrite,
    scale_b,
)
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.exports import merged as merging
from rlsloth.exports.check import _nf4_in_float32
from rlsloth.policy.load import load_model
from rlsloth.policy.lora import add_adapter, load_adapter
from rlsloth.training.source import find_source

pytestmark = pytest.mark.slow

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Sizes for NF4: bitsandbytes 0.50 dequantises rows of under 64 values wrongly on a CPU."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "rslora": ("llama", {}, {"rslora": True}),
    "dora": ("qwen2", {}, {"dora": True}),
    "dora_bf16": ("llama", {}, {"dora": True, "precision": "bf16"}),
    "dora_embedding": (
        "llama",
        {"tie_word_embeddings": True},
        {"dora": True, "targets": ["all-linear", "embed_tokens"]},
    ),
    "dora_nf4": ("llama", WIDE, {"dora": True, "precision": "nf4"}),
    "head": ("llama", {"tie_word_embeddings": True}, {"targets": ["all-linear", "lm_head"]}),
    "embedding": ("llama", {"tie_word_embeddings": True}, {"targets": ["embed_tokens"]}),
    "bf16": ("qwen3", {}, {"precision": "bf16"}),
    "nf4": ("llama", {"tie_word_embeddings": True, **WIDE}, {"precision": "nf4"}),
    "gemma2": ("gemma2", {}, {}),
    "experts": (
        "qwen3_moe",
        {},
        {"targets": ["all-linear", "gate_proj", "up_proj", "down_proj"]},
    ),
    "gpt_oss": ("gpt_oss", {}, {"precision": "bf16"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_merged_is_base_and_adapter(case: str, tmp_path: Path, export: Export, monkeypatch) -> None:
    family, settings, options = CASES[case]
    base = make_base(tmp_path / "base", family, **settings)
    policy = make_run(tmp_path / "run", base, **options)
    want = policy.eval_logprobs(micro_batch())
    monkeypatch.setattr(merging, "SHARD", "20KB")
    out = export(tmp_path / "run", "--to", "merged")
    config = json.loads((out / "config.json").read_bytes())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (out / "model.safetensors.index.json").is_file()
    assert (out / "generation_config.json").is_file()
    tied = settings.get("tie_word_embeddings", family == "gemma2")
    untied = "lm_head" in str(options) or "embed" in str(options)
    assert reopened(out).config.tie_word_embeddings == (tied and not untied)
    names = json.loads((out / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert ("lm_head.weight" in names) == (not tied or untied)
    assert (plain_logprobs(reopened(out)) - want).abs().mean() <= 0.02
    assert AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_merged_in_float32_has_the_logits(case: str, tmp_path: Path) -> None:
    family, settings, options = CASES[case]
    base = make_base(tmp_path / "base", family, **settings)
    make_run(tmp_path / "run", base, **options | {"precision": options.get("precision", "fp32")})
    source = find_source(str(tmp_path / "run"), device="cpu")
    precision = "nf4" if "nf4" in case else "fp32"  # bf16 in float32: the same numbers
    loaded = load_model(source.base.model_copy(update={"precision": precision}))
    assert source.adapter is not None
    adapted = load_adapter(loaded.model, source.adapter, str(base), to_train=False).eval()
    loaded.model.set_attn_implementation("eager")
    ids = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(0))
    with _nf4_in_float32(loaded.model):
        assert_same_logits(adapted, ids)


def assert_same_logits(adapted: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        want = adapted(ids).logits
    done = merging.merge(adapted, torch.float32)
    model = type(done.model)(done.model.config)
    model.load_state_dict(done.state)
    with torch.no_grad():
        assert (model.eval()(ids).logits - want).abs().max() <= 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_linears_with_transposed_weights(dora: bool) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    model = add_adapter(
        GPT2LMHeadModel(config).eval(), LoraConfig(rank=2, dora=dora), ModelConfig()
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
            if "lora_magnitude_vector" in name:
                p.mul_(1 + torch.randn_like(p) / 5)
    ids = torch.arange(20)[None]
    assert_same_logits(model, ids)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_merged_weights_are_those_of_peft(options: dict[str, bool], tmp_path: Path) -> None:
    run = tmp_path / "run"
    adapted = make_run(run, make_base(tmp_path / "base"), precision="fp32", **options).model
    want = copy.deepcopy(adapted).merge_and_unload().state_dict()
    got = merging.merge(adapted, torch.float32).state
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_nf4_is_merged_onto_the_quantised_weights_by_default(
    tmp_path: Path, export: Export
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base, run = make_base(tmp_path / "base", **WIDE), tmp_path / "run"
    make_run(run, base, precision="nf4", zero=True)
    original = load_file(base / "model.safetensors")
    trained = load_file(export(run, "--to", "merged") / "model.safetensors")
    onto = ("--to", "merged", "--onto", "original")
    other = load_file(export(run, *onto, out="original") / "model.safetensors")
    assert trained.keys() == other.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(other[name], value), name
        if "proj" in name:
            codes, state = quantize_4bit(value.float(), quant_type="nf4", compress_statistics=True)
            value = dequantize_4bit(codes, state).bfloat16()
            assert not torch.equal(value, original[name])
        assert torch.equal(trained[name], value), name


def test_f16_and_its_limits(
    trained: tuple[Path, torch.Tensor], run: Path, export: Export, refused: Callable[..., None]
) -> None:
    out = export(trained[0], "--to", "merged", "--dtype", "f16")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert (plain_logprobs(reopened(out)) - trained[1]).abs().mean() <= 0.02
    scale_b(run, 1e7)
    words = ("too large for torch.float16", "pass --dtype bf16")
    refused(run, "--to", "merged", "--dtype", "f16", words=words)


def test_other_adapters_than_lora_are_not_merged(
    base: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    config = peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(reopened(base), config).save_pretrained(tmp_path / "ia3")
    refused(tmp_path / "ia3", "--to", "merged", words=("is not LoRA", "--to adapter"))


def test_whole_modules_that_were_trained_are_taken(
    base: Path, tmp_path: Path, export: Export
) -> None:
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(reopened(base), config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "others")
    head = load_file(export(tmp_path / "others", "--to", "merged") / "model.safetensors")
    want = 1.5 * load_file(base / "model.safetensors")["lm_head.weight"].float()
    assert torch.equal(head["lm_head.weight"], want.bfloat16())


def test_a_bad_read_back_leaves_nothing(
    trained: tuple[Path, torch.Tensor],
    refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = merging.Merged.save

    def damaged(self: merging.Merged, folder: Path) -> None:
        save(self, folder)
        rewrite(
            folder / "model.safetensors",
            lambda name, value: value * 2 if "layers.1.mlp.up_proj" in name else value,
        )

    monkeypatch.setattr(merging.Merged, "save", damaged)
    refused(trained[0], "--to", "merged", words=("1 tensors", "differ", "up_proj"))


def test_a_wrong_merge_is_found(
    trained: tuple[Path, torch.Tensor],
    refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import peft.tuners.lora.layer as layers

    right = layers.Linear.get_delta_weight
    monkeypatch.setattr(layers.Linear, "get_delta_weight", lambda *args: 2 * right(*args))
    refused(trained[0], "--to", "merged", words=("nats a token", "--to adapter"))
