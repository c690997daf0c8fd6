"""Mixtures of experts in vLLM on a GPU: graphs, a cache that gives way, experts that are copies."""

from __future__ import annotations

import pytest
import torch

from helpers.experts_gpu import ATTENTION, policy_of
from helpers.vllm_engines import gap, make
from helpers.vllm_gpu import changed, differences, used
from rlsloth.records import SamplingParams

pytest.importorskip("vllm")
CACHE = 2**30
PREFIXES = [[5, 6, 7], [8] * 11, list(range(9, 60))]
SAMPLING = SamplingParams(24, seed=1)


# As in the real model one of its layers sees a window and one all: of layers that all see a window
# FlashAttention-3 plans ahead, which no model with sinks does. Each token takes all experts.
ALTERNATING = {"num_hidden_layers": 2, "num_local_experts": 4}


@pytest.mark.parametrize(("family", "shape"), [("qwen3_moe", {}), ("gpt_oss", ALTERNATING)])
def test_samples_what_the_trainer_computes(family, shape, tmp_path):
    policy = policy_of(tmp_path, family, ATTENTION, **shape)
    before = {k: v.clone() for k, v in policy.model.state_dict().items() if "lora" not in k}
    engine = make(policy, kv_bytes=CACHE)
    try:
        for version in (1, 2):
            engine.set_weights(changed(policy, version))
            groups = engine.generate(PREFIXES, 8, SAMPLING)
            apart = gap(policy, PREFIXES, groups).mean()
            print(f"{family}, version {version}: {apart:.2g}")
            assert apart < 0.05
        with engine.base_model():
            plain_groups = engine.generate(PREFIXES, 8, SAMPLING)
        with policy.base_model():
            assert gap(policy, PREFIXES, plain_groups).mean() < 0.05
        assert differences(plain_groups, groups)
        awake = used()
        engine.release()
        assert awake - used() > 0.9 * CACHE
        assert not differences(engine.generate(PREFIXES, 8, SAMPLING), groups)
    finally:
        engine.close()
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
