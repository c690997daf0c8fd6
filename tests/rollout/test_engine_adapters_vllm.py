"""Adapters in the vLLM engine: each samples with its own weights, and bad ones are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.tiny import tiny_llama, tiny_tokenizer
from helpers.vllm_engines import LONG, QUESTIONS, chat, gap, logprobs, make
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.errors import UserError
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion, SamplingParams, Weights
from rlsloth.rollout.engine import BASE_VERSION
from rlsloth.rollout.vllm import start as vllm_start
from rlsloth.rollout.vllm.engine import VllmEngine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden=128).save_pretrained(folder)  # heads that vLLM knows
    tiny_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    model = ModelConfig(path=str(folder), device="cpu", precision="fp32")
    return Policy.load(model, LoraConfig(), OptimConfig(), temperature=1.0, total_updates=1)


@pytest.fixture(scope="module")
def engine(policy: Policy) -> Iterator[VllmEngine]:
    engine = make(policy)
    engine.set_weights(policy.weights())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prefixes(policy: Policy) -> list[list[int]]:
    return [chat(policy, question) for question in QUESTIONS]


def variant(policy: Policy, version: int, seed: int) -> Weights:
    """Writes other weights into the live adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.weights().tensors.items():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return replace(policy.weights(), version=version)


def test_adapters_never_see_the_keys_and_values_of_another(engine, policy):
    """One long prompt under adapters A, B, none, A, none: each time the trainer's log-probs."""
    prefix = chat(policy, LONG)
    assert len(prefix) > 3 * vllm_start.BLOCK["cpu"]
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    seen: list[list[Completion]] = []
    for version, seed in ((11, 1), (12, 2), (13, 1)):
        adapter = variant(policy, version, seed)
        before = {n: p.detach().clone() for n, p in adapter.tensors.items()}
        engine.set_weights(adapter)
        for _ in range(2):  # the second time from the cache
            (got,) = engine.generate([prefix], 2, sampling)
            assert gap(policy, [prefix], [got]).max() <= 1e-3
            assert {c.policy_version for c in got} == {version} == {engine.version}
        seen.append(got)
        assert all(torch.equal(before[n], p) for n, p in adapter.tensors.items())
        with engine.base_model():
            (got,) = engine.generate([prefix], 2, sampling)
            assert {c.policy_version for c in got} == {BASE_VERSION}
        with policy.base_model():
            assert gap(policy, [prefix], [got]).max() <= 1e-3
        seen.append(got)
    a, base, b, base_again, a_again, _ = (c[0].logprobs for c in seen)
    assert a == pytest.approx(a_again, abs=1e-5)
    assert base == pytest.approx(base_again, abs=1e-5)
    assert a != pytest.approx(b, abs=1e-2)
    assert a != pytest.approx(base, abs=1e-2)


def test_a_live_adapter_samples_only_once_it_is_loaded(engine, policy, prefixes):
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    engine.set_weights(variant(policy, 20, 3))
    before = engine.generate(prefixes, 1, sampling)
    live = variant(policy, 21, 4)
    assert logprobs(engine.generate(prefixes, 1, sampling)) == pytest.approx(
        logprobs(before), abs=1e-5
    )
    engine.set_weights(live)
    after = engine.generate(prefixes, 1, sampling)
    assert logprobs(after) != pytest.approx(logprobs(before), abs=1e-2)
    assert {c.policy_version for group in after for c in group} == {21}


def test_the_adapter_is_back_after_an_error_inside_base_model(engine, policy, prefixes):
    engine.set_weights(variant(policy, 30, 5))
    with pytest.raises(KeyError), engine.base_model():
        raise KeyError
    got = engine.generate(prefixes[:1], 1, SamplingParams(max_tokens=8, temperature=0.0))
    assert got[0][0].policy_version == 30
    assert gap(policy, prefixes[:1], got).max() <= 1e-3


@pytest.mark.parametrize(
    ("change", "said"), [("lost", r"has no .*q_proj\.lora_A"), ("extra", r"no place for .*nowhere")]
)
def test_lost_or_extra_tensors_are_refused(engine, policy, prefixes, change, said):
    tensors = dict(policy.weights().tensors)
    name = next(n for n in tensors if "q_proj.lora_A" in n)
    if change == "extra":
        tensors[name.replace("q_proj", "nowhere")] = tensors[name]
    else:
        del tensors[name]
    with pytest.raises(UserError, match=said):
        engine.set_weights(Weights(3, "adapter", tensors))
    with pytest.raises(RuntimeError, match="no adapter is loaded"):
        engine.generate(prefixes[:1], 1, SamplingParams(2))
    engine.set_weights(policy.weights())


def test_damaged_weights_are_named(engine, policy, prefixes):
    nan = {n: torch.full_like(p, math.nan) for n, p in policy.weights().tensors.items()}
    engine.set_weights(Weights(9, "adapter", nan))
    with pytest.raises(UserError, match=r"not finite.*version 9"):
        engine.generate(prefixes[:1], 1, SamplingParams(2))
