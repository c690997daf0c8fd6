"""The trial before training: what cannot be computed right is refused, not trained."""

from __future__ import annotations

import gc

import pytest
import torch
from bitsandbytes.nn import Params4bit
from torch import nn

from helpers.engines import engine_of
from helpers.families import FAMILIES, family_policy
from helpers.policies import make_policy
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.errors import UserError
from rlsloth.kernels.nf4.stack import stack
from rlsloth.policy.policy import Policy
from rlsloth.records import LogitTransform
from rlsloth.rollout.trial import probe, trial_backward

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass(family):
    policy = family_policy(family)
    before = {name: p.clone() for name, p in policy.model.state_dict().items()}
    trial_backward(policy)
    probe(policy, engine_of(policy))
    assert policy.version == 0
    assert all(p.grad is None for p in policy.model.parameters())
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_wrong_logits_are_refused_in_training_and_in_sampling():
    policy = make_policy()
    engine = engine_of(policy)
    with torch.no_grad():  # peaked logits, so that a factor shows
        policy.model.get_base_model().get_output_embeddings().weight.mul_(20)
    probe(policy, engine)
    policy.logit_transform = LogitTransform(scale=2.0)
    with pytest.raises(
        UserError, match="packed training of LlamaForCausalLM gives log-probs that differ"
    ):
        probe(policy, engine)
    policy.logit_transform = LogitTransform()
    engine._decoder._transform = LogitTransform(softcap=1.0)
    with pytest.raises(
        UserError, match="sampling from LlamaForCausalLM gives log-probs that differ"
    ):
        probe(policy, engine)


def test_an_engine_that_breaks_is_one_clear_error(monkeypatch):
    policy = make_policy()
    engine = engine_of(policy)
    monkeypatch.setattr(engine._decoder, "prefill", lambda prompts: prompts.get_seq_length())
    with pytest.raises(UserError, match=r"not supported: AttributeError in the trial"):
        probe(policy, engine)


def code_bytes() -> int:
    """Sum the bytes of all living 8-bit storages."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter, Params4bit)]
    storages = [t.untyped_storage() for t in tensors if t.dtype == torch.uint8]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_nf4_weights_that_move_afterwards_leave_nothing_behind(tmp_path):
    tiny_llama(hidden=128).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = Policy.load(
        ModelConfig(path=str(tmp_path), precision="nf4", device="cpu"), LoraConfig(rank=2),
        OptimConfig(), temperature=1.0, total_updates=1,
    )  # fmt: skip
    before = code_bytes()
    trial_backward(policy)
    for layer in policy.model.get_base_model().model.layers:
        mlp = layer.mlp
        stack([m.base_layer.weight for m in (mlp.gate_proj, mlp.up_proj)])
    assert before > 0
    assert code_bytes() == before


def test_an_architecture_without_a_backward_is_one_clear_error(monkeypatch):
    policy = make_policy()

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            raise NotImplementedError("no derivative")

    norm = policy.model.get_base_model().model.norm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: Forward.apply(forward(x)))
    with pytest.raises(
        UserError, match=r"NotImplementedError in the trial before step 1 \(no derivative\)"
    ):
        trial_backward(policy)
