"""Full weights of a trained model, handed to the engines."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.errors import UserError
from rlsloth.policy.attention import interface as attention
from rlsloth.records import SamplingParams, Weights
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.rollout.vllm.engine import VllmEngine

PROMPT = [5, 6, 7]


def weights_of(model: PreTrainedModel, version: int) -> Weights:
    return Weights(version, "all", dict(model.named_parameters()))


def engine_on(model: PreTrainedModel) -> TransformersEngine:
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return TransformersEngine(
        model, tiny_tokenizer(), stop_ids=[], context=64, max_sequences=4,
        device=torch.device("cpu"),
    )  # fmt: skip


def trained_copy(model: PreTrainedModel, steps: int = 3) -> PreTrainedModel:
    """A model after some steps on all parameters."""
    copy = tiny_llama()
    copy.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(copy.parameters(), lr=0.05)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    for _ in range(steps):
        copy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return copy


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([PROMPT + token_ids])).logits[0].float()
    table = logits[len(PROMPT) - 1 : -1].log_softmax(-1)
    return table.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def test_the_embedded_engine_samples_from_full_weights_handed_to_it() -> None:
    model = tiny_llama()
    trained = trained_copy(model)
    engine = engine_on(model)
    sampling = SamplingParams(6, seed=3)
    before = engine.generate([PROMPT], 1, sampling)[0][0]
    engine.set_weights(weights_of(trained, 3))
    after = engine.generate([PROMPT], 1, sampling)[0][0]
    assert after.policy_version == 3
    assert (
        torch.tensor(after.logprobs).sub(own_logprobs(trained, after.token_ids)).abs().max() < 1e-4
    )
    old = own_logprobs(trained, before.token_ids) - torch.tensor(before.logprobs)
    assert old.abs().max() > 0.1


def test_weights_of_the_shared_model_are_not_copied() -> None:
    model = tiny_llama()
    engine = engine_on(model)
    places = [p.data_ptr() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    engine.set_weights(weights_of(model, 5))
    assert engine.version == 5
    assert [p.data_ptr() for p in model.parameters()] == places
    assert [p._version for p in model.parameters()] == versions


def test_weights_of_another_shape_are_refused() -> None:
    engine = engine_on(tiny_llama())
    with pytest.raises(UserError, match="shape"):
        engine.set_weights(weights_of(tiny_llama(hidden=64), 1))
    tensors = dict(tiny_llama().named_parameters())
    del tensors["model.norm.weight"]
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        engine.set_weights(Weights(1, "all", tensors))


def test_vllm_refuses_full_weights() -> None:
    engine = VllmEngine.__new__(VllmEngine)
    engine._whole = None  # as one that was started on an adapter's model
    with pytest.raises(UserError, match=r"--rollout\.engine vllm .*transformers"):
        engine.set_weights(weights_of(tiny_llama(), 1))
