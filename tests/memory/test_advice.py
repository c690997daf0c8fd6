"""Advice where the GPU's memory has run out."""

import torch

from helpers.tiny import tiny_llama
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.memory.out_of_memory import advice
from rlsloth.policy.trainable import make_trainable


def test_layers_that_learn_are_not_advised_into_host_memory() -> None:
    frozen, whole = (
        make_trainable(
            tiny_llama(hidden=64).to(torch.float32).requires_grad_(False), LoraConfig(), model
        )
        for model in (ModelConfig(), ModelConfig(trained=["all"]))
    )
    for phase in ("update", "examples"):
        assert "--model.offload-layers N" in advice(phase, frozen)
        assert "--model.offload-layers" not in advice(phase, whole)
        assert "--optim.offload true" in advice(phase, whole)
    assert advice("rollout", frozen) == advice("rollout", whole)
