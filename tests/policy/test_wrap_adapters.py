"""Wrapped models with adapters: switched, replaced, moved, peculiar, and on NF4 weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from helpers.families import family_model
from helpers.wrapping import SPREAD, adapted, assert_same, randomize, reasons, run
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.policy.lora import REFERENCE, TRAINED, add_adapter, save_adapter
from rlsloth.policy.wrap.wrap import unwrapped, wrap

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_adapter_off(family):
    model = adapted(family)
    stock = copy.deepcopy(model)
    wrap(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    on = model(ids).logits
    with model.disable_adapter(), stock.disable_adapter():
        off = model(ids).logits
        torch.testing.assert_close(off, stock(ids).logits, rtol=0, atol=1e-5)
    assert (on - off).abs().max() > 1e-2
    assert torch.equal(model(ids).logits, on)


def test_an_adapter_is_saved_loaded_and_switched(tmp_path: Path):
    model = adapted("qwen2")
    wrap(model)
    save_adapter(model, tmp_path / "adapter")
    base = family_model("qwen2", **SPREAD)
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())
    source = ModelConfig(adapter=tmp_path / "adapter")
    both = add_adapter(base, LoraConfig(), source)
    wrap(both)
    ids = torch.tensor([[5, 6, 7, 8]])
    want = model(ids).logits
    torch.testing.assert_close(both(ids).logits, want, rtol=0, atol=1e-6)
    with torch.no_grad():
        for name, p in both.named_parameters():
            if f"lora_B.{TRAINED}" in name:
                p.zero_()
    assert (both(ids).logits - want).abs().max() > 1e-2
    both.set_adapter(REFERENCE)
    torch.testing.assert_close(both(ids).logits, want, rtol=0, atol=1e-6)
    both.set_adapter(TRAINED)
    with both.disable_adapter():
        off = both(ids).logits
    assert torch.equal(both(ids).logits, off)


def test_weights_that_are_replaced_are_followed():
    model = adapted("llama").train()
    stock = copy.deepcopy(model)
    wrap(model)
    run(model)
    for one in (model, stock):
        torch.manual_seed(5)
        mlp = one.get_base_model().model.layers[0].mlp
        mlp.gate_proj.base_layer.weight = nn.Parameter(torch.randn(48, 32) / 6, requires_grad=False)
        mlp.up_proj.lora_A[TRAINED].weight = nn.Parameter(torch.randn(4, 32) / 6)
        mlp.down_proj.set_scale(TRAINED, 0.3)
    assert_same(model, stock)


def test_adapters_that_come_and_go_are_followed():
    """Adapters are merged, unmerged and removed: weights are read at each call."""
    model = adapted("llama").eval()
    wrap(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    want = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)
    with model.disable_adapter():
        off = model(ids).logits
    model.merge_adapter()
    with model.disable_adapter():  # here PEFT unmerges the weights
        torch.testing.assert_close(model(ids).logits, off, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    bare = model.unload()
    assert torch.equal(bare(ids).logits, off)


def test_hooks_are_called():
    model = adapted("llama").eval()
    wrap(model)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj.base_layer", "post_attention_layernorm")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.tensor([[5, 6, 7, 8]]))
    assert len(calls) == len(set(calls)) == 3 * 2


def test_weights_that_move_are_followed():
    model = adapted("llama").eval()
    wrap(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data * 1.5  # the same parameter in another storage
    after = model(ids).logits
    assert not torch.allclose(after, before)
    with unwrapped(model):
        want = model(ids).logits
    assert (after - want).abs().max() <= 1e-5 * want.abs().max()


def test_types_that_the_kernels_refuse_are_left_to_peft():
    model = adapted("llama")
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16()
    left = wrap(model).left
    assert left
    assert all("lora_a is torch.bfloat16" in one.reason for one in left), left


def test_targets_may_be_few():
    model = adapted("llama", targets=["q_proj", "down_proj"]).train()
    stock = copy.deepcopy(model)
    assert wrap(model).left == ()
    assert_same(model, stock)


PECULIAR: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "an adapter of kind DoraLinearVariant"),
    "rank-stabilised dora": (
        {"use_dora": True, "use_rslora": True},
        "an adapter of kind DoraLinearVariant",
    ),
    "bias": ({"lora_bias": True}, "an adapter with a bias"),
    "trained bias": ({"bias": "all"}, "a base that is also trained"),
    "dropout": ({"lora_dropout": 0.5}, "LoRA dropout"),
    "saved": (
        {"modules_to_save": ["down_proj"], "target_modules": ["up_proj"]},
        "a linear of kind ModulesToSaveWrapper",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PECULIAR)
def test_peculiar_adapters_are_left_to_peft(kind):
    settings, reason = PECULIAR[kind]
    model = family_model("llama", **SPREAD, attention_bias=True, mlp_bias=True)
    model.set_attn_implementation("eager")
    config = peft.LoraConfig(r=4, **{"target_modules": "all-linear", **settings})
    model = peft.get_peft_model(model, config)
    randomize(model)
    stock = copy.deepcopy(model)
    assert reasons(model)["LlamaMLP"] == f"no lora_mlp, because of {reason}"
    for mode in (True, False):
        model.train(mode)
        stock.train(mode)
        torch.manual_seed(0)  # the same dropout
        got = run(model)
        torch.manual_seed(0)
        want = run(stock)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-5)
        assert got[1].keys() == want[1].keys()
        for name, g in want[1].items():
            assert (got[1][name] - g).abs().max() <= 1e-4 * g.abs().max(), name


def test_rank_stabilised_adapters_are_a_scale():
    model = adapted("llama", rslora=True, alpha=6).train()
    stock = copy.deepcopy(model)
    scales = {m.scaling[TRAINED] for m in model.modules() if isinstance(m, LoraLayer)}
    assert scales == {6 / 4**0.5}
    assert wrap(model).left == ()
    assert_same(model, stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_dora_starts_as_the_base_model(dtype):
    base = family_model("llama", **SPREAD).to(dtype)
    ids = torch.tensor([[5, 6, 7, 8]])
    want = base(ids).logits
    targets = ["all-linear", "embed_tokens"]
    model = add_adapter(base, LoraConfig(rank=4, dora=True, targets=targets), ModelConfig())
    wrap(model)
    got = model.eval()(ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    found = {n: p for n, p in model.named_parameters() if "lora_magnitude_vector" in n}
    assert len(found) == 2 * 7 + 1
    for name, p in found.items():
        path, _, _ = name.partition(".lora_magnitude")
        weight = model.get_submodule(path).base_layer.weight.float()
        across = 0 if "embed" in path else 1
        assert p.requires_grad
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, weight.norm(dim=across), rtol=1e-6, atol=0)


def test_several_adapters_at_once_are_left_to_peft():
    model = adapted("llama")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    randomize(model)
    model.base_model.set_adapter([TRAINED, "second"])
    model.train()
    stock = copy.deepcopy(model)
    wrap(model)
    assert_same(model, stock)


def nf4_model(family: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    family_model(family, **SPREAD, **settings).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    ).requires_grad_(False)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = add_adapter(base, LoraConfig(rank=4), ModelConfig()).train()
    randomize(model)
    return model


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_nf4_bases(family, tmp_path: Path):
    model = nf4_model(family, tmp_path)
    stock = copy.deepcopy(model)
    report = wrap(model)
    assert report.left == ()
    assert report.kernels["lora_mlp"] == 2
    assert_same(model, stock)
    with model.disable_adapter(), stock.disable_adapter(), torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)


def test_nf4_of_another_dtype_is_left_to_bitsandbytes(tmp_path: Path):
    model = nf4_model("llama", tmp_path)
    for layer in model.get_base_model().model.layers:
        layer.mlp.up_proj.base_layer.weight.quant_state.dtype = torch.bfloat16
    stock = copy.deepcopy(model)
    why = "weights in bfloat16 for inputs in float32"
    assert reasons(model) == {"LlamaMLP": f"no lora_mlp, because of {why}"}
    assert_same(model, stock)
