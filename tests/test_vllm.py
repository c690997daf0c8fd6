"""The vLLM engine on SmolLM2-135M-Instruct in float32 against the embedded engine and the trainer.

Run by ``make test-vllm``, in an environment of its own.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test_smollm2 import load

from rlsloth.policy.policy import Policy
from rlsloth.records import Adapter, Completion, SamplingParams, UserError
from rlsloth.rollout import vllm_start
from rlsloth.rollout.engine import BASE_VERSION
from rlsloth.rollout.transformers_engine import TransformersEngine
from rlsloth.rollout.vllm_engine import VllmEngine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CONTEXT = 256
EOS = 2
QUESTIONS = ["What is 17 + 25?", "Name a colour.", "State the sum of 3 and 4 in one word."]
LONG = "Count with me: " + ", ".join(str(i) for i in range(40)) + ". Go on from there. "
"""Longer than several blocks of the prefix cache."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load("fp32")


def make(policy: Policy, **changes: object) -> VllmEngine:
    settings = {
        "peft_config": policy.model.active_peft_config,
        "stop_ids": [EOS],
        "context": CONTEXT,
        "max_sequences": 64,
        "dtype": policy.dtype,
        "device": policy.device,
    }
    return VllmEngine(policy.model, policy.tokenizer, **(settings | changes))


@pytest.fixture(scope="module")
def engine(policy) -> Iterator[VllmEngine]:
    """Starts without a network, and must leave this process as it was."""

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"vLLM went to {address}")

    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        engine = make(policy)
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is set_num_threads
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="no adapter is loaded"):
        engine.generate([[5]], 1, SamplingParams(1))
    engine.load(policy.adapter())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def embedded(policy) -> TransformersEngine:
    return TransformersEngine(
        policy.model,
        policy.tokenizer,
        stop_ids=[EOS],
        context=CONTEXT,
        max_sequences=64,
        device=policy.device,
    )


@pytest.fixture(scope="module")
def prefixes(policy) -> list[list[int]]:
    return [chat(policy, question) for question in QUESTIONS]


def chat(policy: Policy, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    rendered = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return list(rendered["input_ids"])


def tokens(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in completions]


def logprobs(completions: list[list[Completion]]) -> list[float]:
    return [x for group in completions for c in group for x in c.logprobs]


# What it samples


def test_greedy_is_the_embedded_engines(engine, embedded, prefixes):
    sampling = SamplingParams(max_tokens=16, temperature=0.0)
    got, want = (e.generate(prefixes, 2, sampling) for e in (engine, embedded))
    assert tokens(got) == tokens(want)
    assert [[c.finish for c in g] for g in got] == [[c.finish for c in g] for g in want]
    assert logprobs(got) == pytest.approx(logprobs(want), abs=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_logprobs_are_the_trainers_at_the_same_temperature(engine, policy, prefixes, temperature):
    policy.temperature = temperature
    sampling = SamplingParams(max_tokens=24, temperature=temperature, seed=3)
    got = engine.generate(prefixes, 4, sampling)
    want = [
        policy.plain_logprobs(prefix, c.token_ids)
        for prefix, group in zip(prefixes, got, strict=True)
        for c in group
    ]
    policy.temperature = 1.0
    gap = (torch.tensor(logprobs(got)) - torch.cat(want)).abs()
    print(f"float32, T={temperature}: mean |difference| {gap.mean():.2g}, max {gap.max():.2g}")
    assert gap.mean() <= 1e-4


def test_truncated_sampling_reports_the_distribution_drawn_from(engine, policy, prefixes):
    sampling = SamplingParams(max_tokens=1, temperature=0.8, top_k=6, min_p=0.02, top_p=0.7, seed=1)
    (group,) = engine.generate(prefixes[1:2], 64, sampling)
    ids = torch.tensor([[*prefixes[1]]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids, use_cache=False).logits[0, -1].double() / 0.8
    p = logits.softmax(-1)
    order = p.argsort(descending=True)[:6]
    order = order[p[order] >= 0.02 * p.max()]
    kept = p[order] / p[order].sum()
    inside = (kept.cumsum(-1) - kept) < 0.7
    order, kept = order[inside], kept[inside] / kept[inside].sum()
    want = dict(zip(order.tolist(), kept.log().tolist(), strict=True))
    assert 1 < len(want) < 6
    for c in group:
        assert c.logprobs[0] == pytest.approx(want[c.token_ids[0]], abs=1e-3)


# Reproducible


def test_same_seed_same_tokens_whatever_runs_beside(engine, prefixes):
    sampling = SamplingParams(max_tokens=12, seed=7)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = engine.generate(prefixes, 3, sampling)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert tokens(engine.generate(prefixes, 3, sampling)) == tokens(first)
    assert tokens(engine.generate(prefixes[:1], 3, sampling))[0] == tokens(first)[0]
    assert tokens(engine.generate(prefixes, 3, replace(sampling, seed=8))) != tokens(first)
    for group in tokens(first):
        assert len({tuple(t) for t in group}) > 1


# Ends


def test_limits_hold_for_each_prefix_alone(engine, prefixes):
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    free = engine.generate(prefixes, 1, sampling)
    capped = engine.generate(prefixes, 1, sampling, limits=[1, 3, 2])
    for (long,), (short,), limit in zip(free, capped, [1, 3, 2], strict=True):
        assert short.token_ids == long.token_ids[:limit]
        assert len(short.logprobs) == len(short.token_ids)


def test_an_end_token_is_kept_and_ends(engine, prefixes):
    (group,) = engine.generate(prefixes[1:2], 8, SamplingParams(max_tokens=32, seed=2))
    assert "stop" in {c.finish for c in group}
    for c in group:
        assert (EOS in c.token_ids) == (c.finish == "stop")
        assert EOS not in c.token_ids[:-1]
        assert len(c.token_ids) == 32 or c.finish == "stop"


def test_a_stop_string_ends_a_completion_with_its_token(engine, policy, embedded, prefixes):
    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    whole = engine.generate(prefixes[:1], 1, sampling)[0][0]
    text = policy.tokenizer.decode(whole.token_ids[2:4])
    sampling = replace(sampling, stop=("never there", text))
    got, want = (e.generate(prefixes[:1], 1, sampling)[0][0] for e in (engine, embedded))
    assert got.token_ids == want.token_ids == whole.token_ids[: len(got.token_ids)]
    assert got.finish == want.finish == "stop"
    assert len(got.token_ids) < len(whole.token_ids)
    last = replace(sampling, max_tokens=len(got.token_ids))
    assert engine.generate(prefixes[:1], 1, last)[0][0].finish == "stop"


def test_the_context_cuts_a_completion_and_a_full_one_is_refused(engine):
    (group,) = engine.generate([[9] * (CONTEXT - 3)], 2, SamplingParams(max_tokens=50))
    assert all(len(c.token_ids) == 3 or c.finish == "stop" for c in group)
    with pytest.raises(UserError, match=rf"{CONTEXT} tokens.*context of {CONTEXT}.*max-context"):
        engine.generate([[5], [9] * CONTEXT], 1, SamplingParams(max_tokens=5))


# Adapters


def variant(policy: Policy, version: int, seed: int) -> Adapter:
    """Writes other weights into the live adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.adapter().tensors.items():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.03)
    return replace(policy.adapter(), version=version)


def test_adapters_never_see_the_keys_and_values_of_another(engine, embedded, policy):
    """One long prompt under adapters A, B, none, A: each as if it were alone."""
    prefix = chat(policy, LONG)
    assert len(prefix) > 3 * vllm_start.BLOCK
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    texts = []
    for version, seed in ((11, 1), (12, 2), (BASE_VERSION, 0), (13, 1)):
        if version == BASE_VERSION:
            with engine.base_model():
                got = engine.generate([prefix], 2, sampling)
            with embedded.base_model():
                want = embedded.generate([prefix], 2, sampling)
        else:
            adapter = variant(policy, version, seed)
            before = {n: p.detach().clone() for n, p in adapter.tensors.items()}
            engine.load(adapter)
            got, want = (e.generate([prefix], 2, sampling) for e in (engine, embedded))
            assert all(torch.equal(before[n], p) for n, p in adapter.tensors.items())
        assert tokens(got) == tokens(want)
        assert logprobs(got) == pytest.approx(logprobs(want), abs=1e-3)
        assert {c.policy_version for c in got[0]} == {version}
        texts.append(logprobs(got))
    assert texts[0] == pytest.approx(texts[3], abs=1e-5)
    assert texts[0] != pytest.approx(texts[1], abs=1e-2)
    assert texts[0] != pytest.approx(texts[2], abs=1e-2)
    assert len(engine._llm.llm_engine.list_loras()) == 1


def test_a_lost_adapter_is_an_error(engine, policy, prefixes):
    engine._llm.llm_engine.remove_lora(engine._request.lora_int_id)
    with pytest.raises(RuntimeError, match="no longer in vLLM"):
        engine.generate(prefixes[:1], 1, SamplingParams(2))
    engine.load(policy.adapter())
    assert engine.generate(prefixes[:1], 1, SamplingParams(2))[0][0].policy_version == 0


def test_tensors_without_a_module_are_refused(engine, policy, prefixes):
    tensors = dict(policy.adapter().tensors)
    name = next(n for n in tensors if "q_proj.lora_A" in n)
    tensors[name.replace("q_proj", "nowhere")] = tensors[name]
    with pytest.raises(UserError, match=r"no place for .*nowhere"):
        engine.load(Adapter(3, tensors))
    with pytest.raises(RuntimeError, match="no adapter is loaded"):
        engine.generate(prefixes[:1], 1, SamplingParams(2))
    engine.load(policy.adapter())


def test_a_rank_above_the_one_of_the_start_is_refused(engine, policy):
    wide = {n: torch.cat([p, p], int("lora_B" in n)) for n, p in policy.adapter().tensors.items()}
    with pytest.raises(UserError, match=r"rank of .* exceeds 16"):
        engine.load(Adapter(4, wide))
    engine.load(policy.adapter())


# Refused before it starts


def test_a_model_that_vllm_does_not_know_is_refused(policy, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm.ModelRegistry, "get_supported_archs", lambda: set())
    with pytest.raises(UserError, match="vLLM does not know LlamaForCausalLM"):
        make(policy)


@pytest.mark.parametrize("version", ["0.25.3", "0.33.0", "1.0"])
def test_other_releases_are_refused(policy, monkeypatch, version):
    monkeypatch.setattr(vllm_start.importlib.metadata, "version", lambda name: version)
    with pytest.raises(UserError, match=rf"vllm {version} .*0\.26 to 0\.32.*pip install"):
        make(policy)


def test_a_rank_above_vllms_limit_is_refused(policy):
    config = policy.model.active_peft_config
    wide = type(config)(**{**config.to_dict(), "r": 1024})
    with pytest.raises(UserError, match="up to rank 512, not 1024"):
        make(policy, peft_config=wide)


def test_a_temperature_that_vllm_would_change_is_refused(engine, prefixes):
    with pytest.raises(UserError, match=r"between 0 and 0\.01"):
        engine.generate(prefixes, 1, SamplingParams(1, temperature=0.005))


def test_damaged_weights_are_named(engine, policy, prefixes):
    nan = {n: torch.full_like(p, math.nan) for n, p in policy.adapter().tensors.items()}
    engine.load(Adapter(9, nan))
    with pytest.raises(UserError, match=r"not finite.*version 9"):
        engine.generate(prefixes[:1], 1, SamplingParams(2))
    engine.load(policy.adapter())


# The last test: it closes the engine


def test_close_frees_everything(engine):
    import gc
    import weakref

    import psutil

    worker = engine._llm.collective_rpc(lambda worker: weakref.ref(worker.model_runner.model))
    engine.close()
    gc.collect()
    assert worker[0]() is None
    assert not torch.distributed.is_initialized()
    assert not psutil.Process().children(recursive=True)
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([[5]], 1, SamplingParams(1))
    engine.close()
