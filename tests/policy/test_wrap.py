"""Wrapped models against transformers' and PEFT's own: outputs, gradients, adapters, decoding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from helpers.families import FAMILIES, family_model, family_policy
from helpers.policies import VOCAB, make_groups
from helpers.tiny import tiny_llama
from helpers.wrapping import SPREAD, assert_same, decoded, randomize, run
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.lora import REFERENCE, TRAINED, add_adapter, save_adapter
from rlsloth.policy.wrap import forwards
from rlsloth.policy.wrap.preview import preview
from rlsloth.policy.wrap.wrap import unwrapped, wrap

UNKNOWN = ("granite", "cohere")
KNOWN = [family for family in FAMILIES if family not in UNKNOWN]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "phi4_partial_rope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5
            }
        },
    ),
    "mistral_whole": ("mistral", {"sliding_window": None}),
    "qwen3_moe_dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
}  # fmt: skip


def adapted(family: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    name, settings = VARIANTS[family]
    model = family_model(name, **SPREAD, **settings).to(dtype)
    model.set_attn_implementation("eager")
    model = add_adapter(model, LoraConfig(rank=4, **lora), ModelConfig())
    randomize(model)
    return model


# --- every family --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VARIANTS)
def test_outputs_and_gradients_are_those_of_transformers(family):
    model = adapted(family).train()
    stock = copy.deepcopy(model)
    report = wrap(model)
    assert bool(report.kernels) == (family not in UNKNOWN)
    assert_same(model, stock)


@pytest.mark.parametrize("family", KNOWN)
def test_bf16_is_as_near_to_fp32_as_transformers_own(family):
    model = adapted(family, torch.bfloat16).train()
    stock = copy.deepcopy(model)
    exact = copy.deepcopy(model).float()
    wrap(model)
    (got, grads), (near, near_grads), (want, want_grads) = run(model), run(stock), run(exact)

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean().sqrt()

    assert error(got, want) <= 2 * error(near, want)
    ours = torch.cat([(grads[n] - g).flatten() for n, g in want_grads.items()])
    theirs = torch.cat([(near_grads[n] - g).flatten() for n, g in want_grads.items()])
    assert ours.norm() <= 2 * theirs.norm()


@pytest.mark.parametrize("family", KNOWN)
def test_packed_training_is_the_same(family):
    fused, stock = family_policy(family), family_policy(family, fused_kernels=False)
    assert fused.wrapped.kernels
    assert stock.wrapped is None
    for policy in (fused, stock):
        torch.manual_seed(2)
        randomize(policy.model)
    batch = pack(make_groups(1), 10_000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    got, want = fused.logprobs(micro).logprobs, stock.logprobs(micro).logprobs
    assert (got - want).abs().max() <= 1e-5
    got.sum().backward()
    want.sum().backward()
    grads = {n: p.grad for n, p in fused.weights().tensors.items()}
    for n, p in stock.weights().tensors.items():
        assert (grads[n] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max(), n


@pytest.mark.parametrize("family", KNOWN)
def test_decoding_gives_the_same_tokens(family):
    policy = family_policy(family)
    randomize(policy.model)
    got = decoded(policy)
    with unwrapped(policy.model):
        assert got == decoded(policy)
    with policy.base_model():
        base = decoded(policy)
        with unwrapped(policy.model):
            assert base == decoded(policy)


@pytest.mark.parametrize("family", UNKNOWN)
def test_an_unknown_family_is_left_alone_and_says_so(family):
    model = adapted(family)
    report = wrap(model)
    assert not any("forward" in vars(m) for m in model.modules())
    assert (report.wrapped_layers, report.layers) == (0, 2)
    line = report.line()
    assert line.startswith("kernels: none, all layers run on transformers' own modules (")
    assert f"2 {family.title()}Attention" in line
    assert line.count("no class that rlsloth knows") == 1


def test_experts_are_left_to_transformers_and_the_rest_is_wrapped():
    report = wrap(adapted("gpt_oss"))
    assert report.line() == (
        "kernels: 2 of 2 layers wrapped (add_rms_norm, lora_o, lora_qkv, rms_norm, rope); "
        "left alone: 2 GptOssMLP: a mixture of experts, on torch's grouped products, with weights "
        "that are never quantised"
    )


# --- what a wrapper is ---------------------------------------------------------------------------


def test_the_kernels_do_run(monkeypatch):
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(forwards, name)
        monkeypatch.setattr(forwards, name, lambda *a, **k: calls.append(name) or real(*a, **k))

    names = (
        "rms_norm", "fork_rms_norm", "add_rms_norm", "rope", "lora_linears", "lora_linear",
        "lora_mlp",
    )  # fmt: skip
    for name in names:
        counted(name)
    model = adapted("llama")
    report = wrap(model)
    run(model)
    assert {name: calls.count(name) for name in names} == {
        "rms_norm": 1, "fork_rms_norm": 2, "add_rms_norm": 2, "rope": 2, "lora_linears": 2,
        "lora_linear": 2, "lora_mlp": 2,
    }  # fmt: skip
    assert report.kernels == {
        "add_rms_norm": 2, "lora_mlp": 2, "lora_o": 2, "lora_qkv": 2, "rms_norm": 5, "rope": 2
    }  # fmt: skip
    assert report.line() == (
        "kernels: 2 of 2 layers wrapped (add_rms_norm, lora_mlp, lora_o, lora_qkv, rms_norm, rope)"
    )
    calls.clear()
    with unwrapped(model):
        run(model)
    assert calls == []
    run(model)
    assert calls


def test_names_and_classes_stay():
    before = modeling_llama.LlamaMLP.forward, modeling_llama.LlamaDecoderLayer.__call__
    model = adapted("llama")
    modules = [(n, type(m)) for n, m in model.named_modules()]
    names = list(model.state_dict())
    wrap(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert list(model.state_dict()) == names
    assert before == (modeling_llama.LlamaMLP.forward, modeling_llama.LlamaDecoderLayer.__call__)


def test_a_copy_is_its_own():
    model = adapted("qwen3")
    wrap(model)
    twin = copy.deepcopy(model)
    want, _ = run(twin)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(run(twin)[0], want)


def test_outputs_that_transformers_collects_are_there():
    model = adapted("llama")
    stock = copy.deepcopy(model)
    wrap(model)
    ids = torch.tensor([[5, 6, 7]])
    outs = [m(ids, output_hidden_states=True, output_attentions=True) for m in (model, stock)]
    for got, want in zip(outs[0].hidden_states, outs[1].hidden_states, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(outs[0].attentions, outs[1].attentions, strict=True):
        torch.testing.assert_close(got, want)


class OwnMlp(modeling_llama.LlamaMLP):
    """Not the class that is known: it may compute anything."""


def reasons(model: Any) -> dict[str, str]:
    return {left.name: left.reason for left in wrap(model).left}


def test_what_does_not_look_as_it_should_is_left_alone():
    model = adapted("llama")
    one, two = model.get_base_model().model.layers
    one.mlp.__class__ = OwnMlp
    two.mlp.extra = nn.Linear(2, 2)
    one.self_attn.forward = one.self_attn.forward
    del two.self_attn.scaling
    one.drop = nn.Dropout(0.1)
    two.post_attention_layernorm = nn.LayerNorm(32)
    left = {(x.name, x.reason) for x in wrap(model).left}
    assert left == {
        ("OwnMlp", "no class that rlsloth knows"),
        ("LlamaMLP", "its parts are not the known ones (extra)"),
        ("LlamaAttention", "something else has replaced its forward"),
        ("LlamaAttention", "it lacks scaling"),
        ("LlamaDecoderLayer", "it has a dropout of its own"),
        ("LlamaDecoderLayer", "its second norm is not wrapped"),
        ("LayerNorm", "no class that rlsloth knows"),
    }


def test_an_activation_without_a_kernel():
    VARIANTS["relu"] = ("llama", {"hidden_act": "relu"})
    model = adapted("relu")
    del VARIANTS["relu"]
    stock = copy.deepcopy(model)
    assert reasons(model) == {"LlamaMLP": "the activation relu has no kernel"}
    assert_same(model, stock)


# --- adapters ------------------------------------------------------------------------------------


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
    """Merged, unmerged, taken away: the weights are read at each call."""
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
    with model.disable_adapter():  # PEFT takes the merged weights apart here
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


def test_what_the_kernels_do_not_take_is_left_alone():
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


PECULIAR = {
    "dora": ({"use_dora": True}, "an adapter of kind DoraLinearVariant"),
    "bias": ({"lora_bias": True}, "an adapter with a bias"),
    "trained bias": ({"bias": "all"}, "a base that is trained, too"),
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
    base = tiny_llama(VOCAB)
    config = peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear")
    model = peft.get_peft_model(base, config).train()
    randomize(model)
    stock = copy.deepcopy(model)
    assert wrap(model).left == ()
    assert_same(model, stock)


def test_several_adapters_at_once_are_left_to_peft():
    model = adapted("llama")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    randomize(model)
    model.base_model.set_adapter([TRAINED, "second"])
    model.train()
    stock = copy.deepcopy(model)
    wrap(model)
    assert_same(model, stock)


# --- quantised bases, checkpointing --------------------------------------------------------------


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
    why = "weights in bfloat16 under inputs in float32"
    assert reasons(model) == {"LlamaMLP": f"no lora_mlp, because of {why}"}
    assert_same(model, stock)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_checkpointed_layers(family):
    model = adapted(family).train()
    stock = copy.deepcopy(model)
    wrap(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, stock)


# --- before a run --------------------------------------------------------------------------------


def test_preview_reads_the_configuration_only(tmp_path: Path):
    model = family_model("qwen3")
    model.config.save_pretrained(tmp_path)
    name, report = preview(str(tmp_path))
    assert name == "Qwen3ForCausalLM"
    assert report == wrap(add_adapter(model, LoraConfig(), ModelConfig()))
    with pytest.raises(UserError, match="--model "):
        preview(str(tmp_path / "nothing"))


def test_the_trial_step_compares_with_transformers_own_modules(monkeypatch):
    policy = family_policy("llama")
    prompt, tokens = [5, 6, 7], [8, 9]
    want = policy.plain_logprobs(prompt, tokens)
    monkeypatch.setattr(forwards, "lora_mlp", lambda x, *_: torch.zeros_like(x))
    assert torch.equal(policy.plain_logprobs(prompt, tokens), want)
    assert policy.model.config._attn_implementation == attention.NAME
