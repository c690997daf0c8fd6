"""The trial before training: what cannot be computed right is refused, not trained."""

from __future__ import annotations

import pytest
import torch
from test_models import FAMILIES, family_policy
from test_policy import make_policy

from rlsloth.policy.policy import Policy
from rlsloth.probe import probe, trial_backward
from rlsloth.records import LogitTransform, UserError
from rlsloth.rollout.transformers_engine import TransformersEngine


def engine_of(policy: Policy) -> TransformersEngine:
    return TransformersEngine(
        policy.model,
        policy.tokenizer,
        stop_ids=[1],
        context=policy.context,
        max_sequences=4,
        device=policy.device,
        transform=policy.logit_transform,
    )


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
        UserError, match="packed training of LlamaForCausalLM gives other log-probs"
    ):
        probe(policy, engine)
    policy.logit_transform = LogitTransform()
    engine._decoder._transform = LogitTransform(softcap=1.0)
    with pytest.raises(UserError, match="sampling from LlamaForCausalLM gives other log-probs"):
        probe(policy, engine)


def test_an_engine_that_breaks_is_one_clear_error(monkeypatch):
    policy = make_policy()
    engine = engine_of(policy)
    monkeypatch.setattr(engine._decoder, "prefill", lambda prompts: prompts.get_seq_length())
    with pytest.raises(UserError, match=r"not supported: AttributeError in a trial step"):
        probe(policy, engine)


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
    with pytest.raises(UserError, match=r"NotImplementedError in a trial step \(no derivative\)"):
        trial_backward(policy)
