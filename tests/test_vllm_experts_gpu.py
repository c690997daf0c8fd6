"""Mixtures of experts in vLLM on a GPU: graphs, a cache that gives way, experts that are copies."""

from __future__ import annotations

import pytest
import torch
from test_experts_gpu import ATTENTION, policy_of
from test_vllm_gpu import changed, differences, used
from vllm_parts import gap, make

from rlsloth.records import SamplingParams

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CACHE = 2**30
PREFIXES = [[5, 6, 7], [8] * 11, list(range(9, 60))]
SAMPLING = SamplingParams(24, seed=1)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_samples_what_the_trainer_computes(family, tmp_path):
    policy = policy_of(tmp_path, family, ATTENTION)
    before = {k: v.clone() for k, v in policy.model.state_dict().items() if "lora" not in k}
    engine = make(policy, kv_bytes=CACHE)
    try:
        for version in (1, 2):
            engine.load(changed(policy, version))
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
