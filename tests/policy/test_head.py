"""The policy's last steps: the final norm inside linear_logprob, and a LoRA on the output head."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from helpers.engines import engine_of
from helpers.families import family_policy
from helpers.policies import VOCAB, make_groups, make_policy, one_by_one
from helpers.tiny import tiny_llama
from helpers.wrapping import randomize
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.kernels.linear_logprob.op import linear_logprob
from rlsloth.policy import policy as policy_module
from rlsloth.policy.head import before_final_norm
from rlsloth.policy.lora import save_adapter
from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import unwrapped
from rlsloth.records import MicroBatch, SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine

pytestmark = pytest.mark.slow

HEAD = ["q_proj", "lm_head"]


def micro_batch(seed: int = 1) -> MicroBatch:
    batch = pack(make_groups(seed), 10_000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    return micro


def gradients(policy: Policy, logprobs: Tensor) -> dict[str, Tensor]:
    """Gradients of a weighted sum, so that each log-prob has a different one."""
    policy.optimizer.zero_grad()
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    return {n: p.grad.clone() for n, p in policy.weights().tensors.items() if p.grad is not None}


# --- the final norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gemma3_text", "gpt_oss"])
def test_the_norm_inside_the_head_changes_nothing(family, monkeypatch):
    policy, micro = family_policy(family), micro_batch()
    randomize(policy.model)
    norms: list[Any] = []
    real = linear_logprob

    def seen(*args: Any, norm: Any, **settings: Any) -> Any:
        norms.append(norm)
        return real(*args, norm=norm, **settings)

    monkeypatch.setattr(policy_module, "linear_logprob", seen)
    got = policy.logprobs(micro)
    grads = gradients(policy, got.logprobs)
    assert torch.equal(policy.eval_logprobs(micro), got.logprobs)
    assert all(norm is not None for norm in norms)
    monkeypatch.setattr(policy_module, "before_final_norm", lambda _: nullcontext())
    want = policy.logprobs(micro)
    assert norms[-1] is None
    assert torch.equal(got.logprobs, want.logprobs)
    assert torch.equal(got.entropy, want.entropy)
    for name, g in gradients(policy, want.logprobs).items():
        assert (grads[name] - g).abs().max() <= 1e-5 * g.abs().max(), name


def fail_before_final_norm(decoder: Any) -> None:
    with before_final_norm(decoder) as norm:
        x = torch.randn(3, 32)
        assert norm is not None
        assert torch.equal(decoder.norm(x), x)
        raise ZeroDivisionError


def test_the_norm_is_put_back():
    decoder = make_policy().model.get_base_model().get_decoder()
    forward = decoder.norm.forward
    with pytest.raises(ZeroDivisionError):
        fail_before_final_norm(decoder)
    assert decoder.norm.forward is forward


@pytest.mark.parametrize("change", ["hook", "decoder hook", "trained", "unwrapped", "unknown"])
def test_a_norm_with_hooks_or_training_is_not_moved(change):
    policy, micro = family_policy("cohere") if change == "unknown" else make_policy(), micro_batch()
    want = policy.logprobs(micro).logprobs
    decoder = policy.model.get_base_model().get_decoder()
    calls: list[Tensor] = []
    if "hook" in change:
        module = decoder if "decoder" in change else decoder.norm
        module.register_forward_hook(lambda _module, _in, out: calls.append(out))
    if change == "trained":
        decoder.norm.weight.requires_grad_()
    with unwrapped(policy.model) if change == "unwrapped" else nullcontext():
        with before_final_norm(decoder) as norm:
            assert norm is None
        got = policy.logprobs(micro).logprobs
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert len(calls) == ("hook" in change)
    if change == "trained":
        got.sum().backward()
        assert decoder.norm.weight.grad.abs().max() > 0


# --- a LoRA on the head --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_trains_as_transformers_full_logits_do(tied, temperature):
    policy, groups = make_policy(temperature, targets=HEAD, tied=tied), make_groups(1)
    micro = micro_batch()
    got = policy.logprobs(micro).logprobs
    grads = gradients(policy, got)
    assert sum("lm_head" in name for name in grads) == 2
    wanted = got.new_empty(len(got))
    for r, (g, i) in enumerate(micro.source):
        one = one_by_one(policy, groups[g], groups[g].rollouts[i], temperature)
        wanted = wanted.masked_scatter(micro.rollout_of == r, one)
    assert (got - wanted).abs().max() <= 1e-5
    stock = gradients(policy, wanted)
    assert grads.keys() == stock.keys() == policy.weights().tensors.keys()
    for name, grad in stock.items():
        assert (grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name
    assert torch.equal(policy.eval_logprobs(micro), got)
    base = policy.reference_logprobs(micro)
    assert (base - got).abs().max() > 1e-2
    with policy.base_model():
        (g, i) = micro.source[0]
        one = one_by_one(policy, groups[g], groups[g].rollouts[i], temperature)
    assert (base[micro.rollout_of == 0] - one).abs().max() <= 1e-5


def test_the_head_alone_may_be_adapted_and_is_updated():
    policy, micro = make_policy(targets=["lm_head"]), micro_batch()
    before = policy.logprobs(micro).logprobs
    (-before.sum()).backward()
    policy.step()
    assert (policy.eval_logprobs(micro) - before).abs().max() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_the_engine_samples_with_the_adapted_head(tied):
    policy = make_policy(targets=HEAD, tied=tied)
    engine = TransformersEngine(
        policy.model, policy.tokenizer, stop_ids=[1], context=128, max_sequences=4,
        device=policy.device, transform=policy.logit_transform,
    )  # fmt: skip
    prompt, sampling = [5, 6, 7], SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    sampled = []
    for adapter in (nullcontext(), policy.base_model()):
        with adapter:
            for completion in engine.generate([prompt], 3, sampling)[0]:
                want = plain_logprobs(policy, prompt, completion.token_ids)
                torch.testing.assert_close(
                    torch.tensor(completion.logprobs), want, rtol=0, atol=1e-5
                )
                sampled.append(completion.logprobs)
    assert sampled[:3] != sampled[3:]


def test_a_saved_adapter_of_the_head_is_loaded_twice(tmp_path: Path):
    first, micro = make_policy(targets=HEAD), micro_batch()
    save_adapter(first.model, tmp_path / "adapter")
    again = make_policy(adapter=tmp_path / "adapter")
    want = first.eval_logprobs(micro)
    assert torch.equal(again.eval_logprobs(micro), want)
    with torch.no_grad():
        for name, p in again.weights().tensors.items():
            if "lm_head.lora_B" in name:
                p.zero_()
    assert (again.eval_logprobs(micro) - want).abs().max() > 1e-2
    assert torch.equal(again.reference_logprobs(micro), want)


def test_all_linear_leaves_the_head_out_unless_it_is_named():
    body = set(make_policy().weights().tensors)
    assert not any("lm_head" in name for name in body)
    both = set(make_policy(targets=["all-linear", "lm_head"]).weights().tensors)
    assert both > body
    assert len(both - body) == 2
    assert all("lm_head.lora_" in name for name in both - body)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_head_is_neither_scored_nor_sampled(tied):
    """Merging would have changed a tied embedding as well."""
    policy, micro = make_policy(targets=HEAD, tied=tied), micro_batch()
    engine = engine_of(policy)
    want = policy.eval_logprobs(micro)
    uses = [lambda: policy.eval_logprobs(micro), lambda: policy.logprobs(micro),
            lambda: engine.generate([[5, 6, 7]], 1, SamplingParams(max_tokens=2))]  # fmt: skip
    policy.model.merge_adapter()
    for use in uses:
        for adapter in (nullcontext(), policy.base_model()):
            with adapter, pytest.raises(UserError, match=r"merged .*unmerge_adapter\(\)"):
                use()
    policy.model.unmerge_adapter()
    torch.testing.assert_close(policy.eval_logprobs(micro), want, rtol=0, atol=1e-5)
    for use in uses:
        use()


def test_dropout_on_the_head_is_refused():
    with pytest.raises(UserError, match=r"output head .*\(LoRA dropout\).* --lora\.targets"):
        make_policy(targets=HEAD, dropout=0.1)
    make_policy(targets=["q_proj"], dropout=0.1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "DoraLinearVariant"), ({"lora_bias": True}, "an adapter with a bias")],
)
def test_peculiar_adapters_on_the_head_are_refused(settings, reason, tmp_path: Path):
    config = peft.LoraConfig(r=4, target_modules=HEAD, task_type="CAUSAL_LM", **settings)
    save_adapter(peft.get_peft_model(tiny_llama(VOCAB), config), tmp_path / "adapter")
    with pytest.raises(UserError, match=f"output head .*{reason}"):
        make_policy(adapter=tmp_path / "adapter")
