"""Experts loaded from folders: training, decoding, and quantised checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.experts import ATTENTION, FAMILIES, LAYERS, SIZES, GroupedProducts
from helpers.families import family_model
from helpers.policies import make_groups
from helpers.tiny import tiny_llama, tiny_tokenizer
from helpers.wrapping import SPREAD, decoded
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.load import load_model
from rlsloth.policy.policy import Policy

pytestmark = pytest.mark.slow


# --- loading -------------------------------------------------------------------------------------


def saved(folder: Path, family: str, changes: dict[str, Any], **settings: Any) -> Any:
    """A model's folder with changes to its config.json."""
    model = family_model(family, **{**SIZES, **settings}, **SPREAD)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return model


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, precision: str) -> Any:
    return load_model(ModelConfig(path=str(folder), precision=precision, device="cpu"))


def policy_of(folder: Path) -> Policy:
    return Policy.load(
        ModelConfig(path=str(folder), device="cpu", precision="fp32"),
        LoraConfig(rank=4, targets=ATTENTION), OptimConfig(), temperature=1.0, total_updates=1,
    )  # fmt: skip


def assert_buffers_of_a_plain_load(
    packed: Path, precision: str, family: str, **settings: Any
) -> None:
    """In bf16, positions would be off by several at the end of a long completion."""
    saved(packed / "plain", family, {}, **settings)
    got, want = (dict(load(f, precision).model.named_buffers()) for f in (packed, packed / "plain"))
    assert got.keys() == want.keys()
    assert any("inv_freq" in name for name in want)
    for name, buffer in want.items():
        assert got[name].dtype == buffer.dtype
        assert torch.equal(got[name], buffer), name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_decoding_run_on_grouped_products(family, tmp_path: Path):
    """They do so whatever the checkpoint's own configuration requests."""
    saved(tmp_path, family, {"experts_implementation": "eager"})
    policy = policy_of(tmp_path)
    batch = pack(make_groups(1), 10_000, mask_truncated=False, keep_zero_advantage=True)
    with GroupedProducts() as training:
        policy.logprobs(batch.microbatches[0])
    assert training.counts == {3: 2 * LAYERS}
    with GroupedProducts() as decoding:
        decoded(policy)
    assert decoding.counts[3] > 2 * LAYERS  # those of the prompts, then of one step for each token


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_is_the_same_in_training(family, tmp_path: Path):
    """It adds no noise, and no loss of its own even if the configuration requests its logits."""
    saved(tmp_path / "plain", family, {})
    saved(tmp_path / "logits", family, {"output_router_logits": True})
    batch = pack(make_groups(1), 10_000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    plain, logits = policy_of(tmp_path / "plain"), policy_of(tmp_path / "logits")
    want = plain.eval_logprobs(micro)
    assert torch.equal(plain.logprobs(micro).logprobs, want)
    assert torch.equal(logits.logprobs(micro).logprobs, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_is_refused_for_models_of_experts(family, tmp_path: Path):
    saved(tmp_path, family, {})
    (tmp_path / "model.safetensors").unlink()  # refused before any weight is read
    with pytest.raises(UserError, match=r"nf4: 7\d% of the weights of .* are experts, which "):
        load(tmp_path, "nf4")


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_experts_are_unpacked(tmp_path: Path):
    """OpenAI stores gpt-oss as 4-bit numbers, low ones first, with an exponent for each 32."""
    saved(tmp_path, "gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}})
    tensors, want = load_file(tmp_path / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, shape, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = FP4[torch.stack((blocks & 15, blocks >> 4), -1).long()].flatten(-2)
        scaled = numbers * torch.exp2(scales.float() - 127)[..., None]
        want[name] = scaled.flatten(-2).transpose(1, 2)
    rewrite(tmp_path, tensors)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        got = dict(load(tmp_path, precision).model.named_parameters())
        assert {p.dtype for p in got.values()} == {dtype}
        for name, values in want.items():
            assert torch.equal(got[name].float(), values)
        assert_buffers_of_a_plain_load(tmp_path, precision, "gpt_oss")


def test_fp8_weights_are_unpacked(tmp_path: Path):
    """Qwen stores its FP8 models with a scale for each block of 128 x 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    stored["activation_scheme"] = "dynamic"
    changes = {"quantization_config": stored}
    model = saved(tmp_path, "qwen3_moe", changes, **sizes, head_dim=32)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    rewrite(tmp_path, tensors)
    for precision in ("fp32", "bf16"):
        assert_buffers_of_a_plain_load(tmp_path, precision, "qwen3_moe", **sizes, head_dim=32)
    got = dict(load(tmp_path, "fp32").model.named_parameters())
    for name, p in model.named_parameters():
        assert (got[name] - p).abs().max() <= 0.04 * p.abs().max(), name


def test_a_checkpoint_in_nf4_stays_in_nf4(tmp_path: Path):
    model = tiny_llama(hidden=64)
    model.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    packed = load(tmp_path / "plain", "nf4")
    packed.model.save_pretrained(tmp_path / "packed")
    packed.tokenizer.save_pretrained(tmp_path / "packed")
    ids = torch.tensor([[5, 6, 7, 8]])
    got, want = (m(ids).logits for m in (load(tmp_path / "packed", "fp32").model, packed.model))
    assert torch.equal(got, want)
