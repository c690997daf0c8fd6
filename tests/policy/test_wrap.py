"""Wrapped models compared with transformers' own modules: outputs, gradients, decoding, report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from helpers.families import FAMILIES, family_model, family_policy
from helpers.policies import make_groups
from helpers.wrapping import (
    UNKNOWN,
    VARIANTS,
    adapted,
    assert_same,
    decoded,
    randomize,
    reasons,
    run,
)
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.lora import add_adapter
from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.policy.wrap import forwards
from rlsloth.policy.wrap.preview import preview
from rlsloth.policy.wrap.wrap import UNKNOWN as UNKNOWN_CLASS
from rlsloth.policy.wrap.wrap import unwrapped, wrap

pytestmark = pytest.mark.slow

KNOWN = [family for family in FAMILIES if family not in UNKNOWN]


@pytest.mark.parametrize("family", VARIANTS)
def test_outputs_and_gradients_are_those_of_transformers(family):
    model = adapted(family).train()
    stock = copy.deepcopy(model)
    report = wrap(model)
    assert bool(report.kernels) == (family not in UNKNOWN)
    assert_same(model, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", KNOWN)
def test_16_bits_are_as_near_to_fp32_as_transformers_own(family, dtype):
    model = adapted(family, dtype).train()
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
        difference = (grads[n] - p.grad).abs()  # type: ignore[operator]
        assert difference.max() <= 1e-4 * p.grad.abs().max(), n


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
def test_an_unknown_family_is_not_wrapped_and_reported(family):
    model = adapted(family)
    report = wrap(model)
    assert not any("forward" in vars(m) for m in model.modules())
    assert (report.wrapped_layers, report.layers) == (0, 2)
    line = report.line()
    assert line.startswith("kernels: none, all layers run on transformers' own modules (")
    assert f"2 {family.title()}Attention" in line
    assert line.count(UNKNOWN_CLASS) == 1


def test_experts_are_left_to_transformers_and_the_rest_is_wrapped():
    report = wrap(adapted("gpt_oss"))
    assert report.line() == (
        "kernels: 2 of 2 layers wrapped (add_rms_norm, lora_o, lora_qkv, rms_norm, rope); "
        "not wrapped: 2 GptOssMLP: a mixture of experts, on torch's grouped products, with weights "
        "that are never quantised"
    )


def test_the_kernels_do_run(monkeypatch):
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(forwards, name)

        def run(*arguments: Any, **settings: Any) -> Any:
            calls.append(name)
            return real(*arguments, **settings)

        monkeypatch.setattr(forwards, name, run)

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


class OwnMlp(modeling_llama.LlamaMLP):  # type: ignore[misc]
    """A subclass of a known class, which may compute anything."""


def test_modules_that_differ_from_the_known_class_are_not_wrapped():
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
        ("OwnMlp", UNKNOWN_CLASS),
        ("LlamaMLP", "its parts differ from the known class (extra)"),
        ("LlamaAttention", "its forward was replaced already"),
        ("LlamaAttention", "it lacks scaling"),
        ("LlamaDecoderLayer", "it contains a dropout"),
        ("LlamaDecoderLayer", "its second norm is not wrapped"),
        ("LayerNorm", UNKNOWN_CLASS),
    }


def test_an_activation_without_a_kernel():
    VARIANTS["relu"] = ("llama", {"hidden_act": "relu"})
    model = adapted("relu")
    del VARIANTS["relu"]
    stock = copy.deepcopy(model)
    assert reasons(model) == {"LlamaMLP": "the activation relu has no kernel"}
    assert_same(model, stock)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_checkpointed_layers(family):
    model = adapted(family).train()
    stock = copy.deepcopy(model)
    wrap(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, stock)


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
    want = plain_logprobs(policy, prompt, tokens)
    monkeypatch.setattr(forwards, "lora_mlp", lambda x, *_: torch.zeros_like(x))
    assert torch.equal(plain_logprobs(policy, prompt, tokens), want)
    assert policy.model.config._attn_implementation == attention.NAME
