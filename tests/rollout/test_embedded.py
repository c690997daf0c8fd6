"""The embedded engine against transformers' generate and forward."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.embedded_engines import (  # noqa: F401
    CONTEXT,
    PROMPTS,
    STOP_IDS,
    make_engine,
    model,
    tokens,
)
from helpers.sampling import chi_square_excess, reference_distribution
from helpers.tiny import tiny_llama
from rlsloth.memory.workload import Workload
from rlsloth.records import Completion, SamplingParams, Weights
from rlsloth.rollout.embedded.opening import fill_cache
from rlsloth.rollout.embedded.slot_cache import SlotCache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stock() -> Any:
    model = tiny_llama(context=CONTEXT)
    model.set_attn_implementation("eager")
    return model


# Against transformers


@pytest.mark.parametrize("max_sequences", [2, 64])
def test_greedy_is_what_generate_gives_one_by_one(make_engine, stock, max_sequences):
    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    got = make_engine(max_sequences).generate(PROMPTS, 1, sampling)
    ended = 0
    for prompt, (completion,) in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([prompt])
        want = stock.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=list(STOP_IDS),
        )[0, len(prompt) :].tolist()
        assert completion.token_ids == want
        assert completion.finish == ("stop" if want[-1] in STOP_IDS else "length")
        ended += completion.finish == "stop"
    assert 0 < ended < len(PROMPTS)  # both ways of ending were seen


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_logprobs_are_the_models_own_at_the_same_temperature(make_engine, stock, temperature):
    sampling = SamplingParams(max_tokens=20, temperature=temperature, seed=3)
    for prompt, group in zip(PROMPTS, make_engine(3).generate(PROMPTS, 2, sampling), strict=True):
        for completion in group:
            with torch.no_grad():
                logits = stock(torch.tensor([prompt + completion.token_ids])).logits[0]
            scores = (logits / (temperature or 1.0)).log_softmax(-1)[len(prompt) - 1 : -1]
            want = scores.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert (torch.tensor(completion.logprobs) - want).abs().max() <= 1e-5


def test_truncated_sampling_reports_the_distribution_drawn_from(make_engine, stock):
    sampling = SamplingParams(max_tokens=1, temperature=0.8, top_k=6, top_p=0.7, seed=1)
    prompt = PROMPTS[1]
    (group,) = make_engine(512).generate([prompt], 512, sampling)
    with torch.no_grad():
        logits = stock(torch.tensor([prompt])).logits[0, -1]
    kept = reference_distribution(logits.numpy(), sampling)
    assert np.count_nonzero(kept) < 6  # top_p cut further than top_k
    for completion in group:
        (token,), (logprob,) = completion.token_ids, completion.logprobs
        assert logprob == pytest.approx(math.log(kept[token]), abs=1e-5)
    assert {c.token_ids[0] for c in group} == set(np.flatnonzero(kept))


# Reproducible, whatever else is in the batch


def test_tokens_depend_on_the_seed_alone(make_engine):
    def run(max_sequences: int, seed: int) -> list[list[list[int]]]:
        sampling = SamplingParams(max_tokens=24, seed=seed)
        return tokens(make_engine(max_sequences).generate(PROMPTS, 5, sampling))

    want = run(64, seed=1)
    assert run(64, seed=1) == run(3, seed=1) == run(1, seed=1) == want
    assert run(64, seed=2) != want
    for group in want:
        assert len({tuple(t) for t in group}) > 1  # continuations of one prefix differ


def test_tokens_do_not_depend_on_the_prompts_beside(make_engine):
    engine, sampling = make_engine(4), SamplingParams(max_tokens=24, seed=9)
    beside_some = tokens(engine.generate([PROMPTS[2], PROMPTS[1], PROMPTS[4]], 3, sampling))
    beside_others = tokens(engine.generate([PROMPTS[3], PROMPTS[1], PROMPTS[0]], 3, sampling))
    assert beside_some[1] == beside_others[1]
    assert beside_some[0] != beside_others[0]


def test_global_random_state_plays_no_part_and_stays(make_engine):
    sampling = SamplingParams(max_tokens=8, seed=4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = tokens(make_engine().generate(PROMPTS, 2, sampling))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert tokens(make_engine().generate(PROMPTS, 2, sampling)) == first


def test_first_tokens_come_as_often_as_the_model_says(make_engine, stock):
    draws = 4000
    sampling = SamplingParams(max_tokens=1, temperature=0.5, seed=5)
    (group,) = make_engine(draws).generate([PROMPTS[4]], draws, sampling)
    counts = np.bincount([c.token_ids[0] for c in group], minlength=259)
    with torch.no_grad():
        expected = (stock(torch.tensor([PROMPTS[4]])).logits[0, -1] / 0.5).softmax(-1).numpy()
    assert chi_square_excess(counts, expected) < 5


def test_completions_carry_the_adapters_version(make_engine):
    engine = make_engine()
    sampling = SamplingParams(max_tokens=2)
    assert engine.generate(PROMPTS[:1], 1, sampling)[0][0].policy_version == engine.version == 0
    engine.set_weights(Weights(7, "adapter", {}))
    assert engine.generate(PROMPTS[:1], 1, sampling)[0][0].policy_version == engine.version == 7


# Early ends


@pytest.mark.parametrize("max_sequences", [3, 64])
def test_a_prefix_is_told_of_when_its_last_completion_ends(make_engine, monkeypatch, max_sequences):
    engine, sampling = make_engine(max_sequences), SamplingParams(max_tokens=24, seed=1)
    steps = 0
    plain_step = engine._decoder.step

    def step(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return plain_step(*arguments)

    monkeypatch.setattr(engine._decoder, "step", step)
    told: dict[int, tuple[int, list[Completion]]] = {}

    def done(prefix: int, completions: list[Completion]) -> None:
        assert prefix not in told
        told[prefix] = steps, completions

    got = engine.generate(PROMPTS, 5, sampling, done=done)
    assert [told[p][1] for p in range(len(PROMPTS))] == got
    if max_sequences == 64:  # all start at once, with a first token that takes no step
        for at, group in told.values():
            assert at == max(len(c.token_ids) for c in group) - 1
    assert len({at for at, _ in told.values()}) > 1


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 0.99])
def test_the_tail_is_cut_once_a_share_has_finished(make_engine, share):
    sampling = SamplingParams(max_tokens=40, seed=6)
    whole, cut = (
        [c for group in make_engine().generate(PROMPTS, 6, s) for c in group]
        for s in (sampling, replace(sampling, cut_tail=share))
    )
    # All start at once, so the step in which enough have finished is known.
    last = sorted(len(c.token_ids) for c in whole)[math.ceil(share * len(whole)) - 1]
    for long, short in zip(whole, cut, strict=True):
        assert short.token_ids == long.token_ids[:last]
        assert len(short.logprobs) == len(short.token_ids)
        assert short.finish == (long.finish if len(long.token_ids) <= last else "length")
    assert (cut == whole) == (last == 40)


def test_what_waits_when_the_tail_is_cut_gets_its_first_token(make_engine):
    sampling = SamplingParams(max_tokens=40, seed=6)
    told: dict[int, list[Completion]] = {}
    whole, cut = (
        make_engine(3).generate(PROMPTS, 6, s, done=told.__setitem__)
        for s in (sampling, replace(sampling, cut_tail=0.25))
    )
    assert [told[p] for p in range(len(PROMPTS))] == cut
    finished = 0
    for long, short in zip(chain(*tokens(whole)), chain(*tokens(cut)), strict=True):
        assert short == long[: len(short)]
        finished += short == long
    assert 9 <= finished < 20
    assert {len(ids) for ids in chain(*tokens(cut[2:]))} == {1}


# Prefixes


@pytest.mark.parametrize("max_sequences", [1, 3, 8, 10, 64])
def test_a_groups_prefix_is_computed_once(make_engine, monkeypatch, max_sequences):
    """In waves, too: sequences that find no row at first take the prefix from one that has."""
    engine = make_engine(max_sequences)
    computed: list[list[int]] = []
    prefill = engine._decoder.prefill

    def counted(prompts: list[list[int]]) -> Any:
        computed.extend(prompts)
        return prefill(prompts)

    monkeypatch.setattr(engine._decoder, "prefill", counted)
    engine.generate(PROMPTS, 4, SamplingParams(max_tokens=12, seed=2))
    assert sorted(computed) == sorted(PROMPTS)


# Memory


def test_the_cache_is_made_as_large_as_the_run_needs_it(make_engine, monkeypatch):
    engine = make_engine(6)
    made: list[SlotCache] = []
    cache = engine._decoder.cache

    def noted(rows: int, length: int) -> SlotCache:
        made.append(cache(rows, length))
        return made[-1]

    monkeypatch.setattr(engine._decoder, "cache", noted)
    workload = Workload(
        prompts=4, group_size=4, sequences=16, max_tokens=20, longest_prompt=9, sharing=4
    )
    drawn = engine.generate(PROMPTS, 2, SamplingParams(max_tokens=4, seed=1))
    shape: Any = SimpleNamespace(context=CONTEXT)
    fill_cache(engine, shape, workload)
    assert (made[-1].rows, made[-1].length) == (6, 29)
    assert all(len(keys) == 6 and keys.shape[2] == 29 for keys in made[-1]._keys)
    assert made[-1].active == 0
    assert engine.generate(PROMPTS, 2, SamplingParams(max_tokens=4, seed=1)) == drawn
    fill_cache(engine, shape, replace(workload, sequences=3, max_tokens=9999))
    assert (made[-1].rows, made[-1].length) == (3, CONTEXT)
