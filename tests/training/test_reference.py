"""Scoring a step's micro-batches by the policy before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.policies import VOCAB, make_groups
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.policy.whole import WholeModel
from rlsloth.training.reference import score_by_reference


@pytest.mark.parametrize("trained", ["adapter", "all"])
def test_the_policy_leaves_once_for_all_micro_batches(
    trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention.register()
    model = tiny_llama(VOCAB).requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    policy = Policy(
        LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), torch.float32),
        ModelConfig.model_validate({"trained": trained}), LoraConfig(),
        OptimConfig(lr=0.1), temperature=1.0, total_updates=10,
    )  # fmt: skip
    micros = pack(make_groups(3), 40, mask_truncated=False, keep_zero_advantage=True).microbatches
    assert len(micros) > 2
    before = [policy.eval_logprobs(micro) for micro in micros]
    policy.backward(-policy.logprobs(micros[0]).logprobs.mean())
    policy.step()
    after = [policy.eval_logprobs(micro) for micro in micros]
    exchanges = []
    disable = WholeModel.disable_adapter

    def counted(self: WholeModel) -> Any:
        exchanges.append(1)
        return disable(self)

    monkeypatch.setattr(WholeModel, "disable_adapter", counted)
    found = score_by_reference(policy, micros)
    assert all(torch.equal(*pair) for pair in zip(found, before, strict=True))
    assert len(exchanges) == (trained == "all")
    assert not torch.equal(found[0], after[0])
    assert torch.equal(policy.eval_logprobs(micros[0]), after[0])
