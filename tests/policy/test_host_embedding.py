"""An embedding in host memory: equal results, and one line where it must be on the GPU."""

from __future__ import annotations

import pytest
import torch

from helpers.allocations import stream
from helpers.plans import make_policy
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.errors import UserError
from rlsloth.policy.host_embedding import HostEmbedding, offload_embeddings
from rlsloth.policy.policy import Policy
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine


def load(path: str, offload: bool) -> Policy:
    torch.manual_seed(0)
    model = ModelConfig(path=path, device="cpu", precision="fp32", offload_embeddings=offload)
    return Policy.load(model, LoraConfig(), OptimConfig(), temperature=1.0, total_updates=2)


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_training_and_sampling_are_those_of_a_resident_embedding(folder):
    resident, offloaded = load(folder, False), load(folder, True)
    embedding = offloaded.model.get_base_model().get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    assert offloaded.embeddings == resident.embeddings
    assert not any(p is embedding.weight for p in offloaded.model.parameters())
    micro = stream(2, 20, 15, 3)
    samples = []
    for policy in (resident, offloaded):
        for _ in range(2):
            policy.logprobs(micro).logprobs.sum().backward()
            policy.step()
        engine = TransformersEngine(
            policy.model, policy.tokenizer, stop_ids=[], context=64, max_sequences=4,
            device=policy.device,
        )  # fmt: skip
        engine.set_weights(policy.weights())
        made = engine.generate([[5, 6, 7]], 4, SamplingParams(8, seed=1))
        samples.append([one.token_ids for one in made[0]])
    assert samples[0] == samples[1]
    weights = offloaded.weights().tensors
    for name, tensor in resident.weights().tensors.items():
        assert torch.equal(weights[name], tensor), name


def test_a_tied_embedding_is_refused():
    model = make_policy("gemma2").model.get_base_model()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with pytest.raises(UserError, match=r"offload-embeddings true: .* pass false"):
        offload_embeddings(model)
