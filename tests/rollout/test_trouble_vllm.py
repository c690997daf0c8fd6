"""vLLM fails while it samples, and what is left of it afterwards, in this process."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import linear

from helpers.vllm_weights import PREFIXES, SAMPLING, make, start, vllm_model  # noqa: F401
from rlsloth.errors import UserError
from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.records import SamplingParams

pytestmark = pytest.mark.slow


def broken(engine: object) -> None:
    raise RuntimeError("an illegal memory access")


@pytest.mark.parametrize("base", [True, False])
def test_a_failure_is_one_line_also_inside_base_model(make, monkeypatch, base):
    from vllm.v1.engine.llm_engine import LLMEngine

    policy = make()
    with start(policy) as engine:
        engine.set_weights(policy.weights())
        engine.generate(PREFIXES, 1, SAMPLING)
        monkeypatch.setattr(LLMEngine, "step", broken)

        def generate() -> None:
            with engine.base_model() if base else nullcontext():
                engine.generate(PREFIXES, 1, SAMPLING)

        with pytest.raises(UserError, match=r"vLLM failed while sampling \(RuntimeError: an ill"):
            generate()


def test_another_thread_interrupts_it(make):
    policy = make()
    with start(policy) as engine, ThreadPoolExecutor(1) as pool:
        engine.set_weights(policy.weights())
        job = pool.submit(engine.generate, PREFIXES, 4, SamplingParams(140, seed=1))
        engine.interrupt()
        assert "interrupted" in str(job.exception(timeout=60))


def test_nothing_is_left_after_close(make):
    policy = make()
    with start(policy) as engine:
        engine.set_weights(policy.weights())
        engine.generate(PREFIXES, 1, SAMPLING)
        left = [weakref.ref(vllm_model(engine)), *map(weakref.ref, engine._loaded.slots)]
        assert len(left) > 4
    gc.collect()
    assert not [ref for ref in left if ref() is not None]


def test_base_model_before_any_adapter_changes_nothing(make):
    with start(make()) as engine:
        with engine.base_model():
            engine.generate(PREFIXES, 1, SAMPLING)
        assert engine.version == 0
        with pytest.raises(RuntimeError, match="no adapter is loaded"):
            engine.generate(PREFIXES, 1, SAMPLING)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_head(make):
    policy = make(tied=True, targets=["lm_head", "q_proj"])
    with start(policy) as engine:
        engine.set_weights(policy.weights())
        (group,) = engine.generate(PREFIXES[:1], 1, SAMPLING)
    own = plain_logprobs(policy, PREFIXES[0], group[0].token_ids)
    assert (torch.tensor(group[0].logprobs) - own).abs().max() < 1e-4


def test_a_part_of_a_trainers_weight_is_refused(make, monkeypatch):
    """Its address is the whole one's."""
    from rlsloth.rollout.vllm import loader as vllm_loader

    policy = make()
    real = vllm_loader.checkpoint
    monkeypatch.setattr(
        vllm_loader,
        "checkpoint",
        lambda base: {n: t[: len(t) // 2] if "down" in n else t for n, t in real(base).items()},
    )
    with pytest.raises(UserError, match="splits a weight"), start(policy):
        pytest.fail("it started")
    down = policy.model.get_base_model().model.layers[0].mlp.down_proj
    weight = down.get_base_layer().weight
    assert linear(torch.ones(1, weight.shape[1]), weight).isfinite().all()
