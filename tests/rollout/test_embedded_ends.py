"""Ends of the embedded engine's completions: limits, the context, end tokens, stop strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.embedded_engines import CONTEXT, EOS, PROMPTS, STOP_IDS, make_engine, model  # noqa: F401
from helpers.tiny import tiny_tokenizer
from rlsloth.errors import UserError
from rlsloth.records import Completion, SamplingParams
from rlsloth.rollout.embedded import engine as transformers_engine


def test_limits_hold_for_each_prefix_alone(make_engine):
    limits = [1, 5, 12, 3, 7, 2]
    sampling = SamplingParams(max_tokens=12, seed=2)
    free = make_engine(4, [EOS]).generate(PROMPTS, 1, sampling)
    capped = make_engine(4, [EOS]).generate(PROMPTS, 1, sampling, limits=limits)
    for (long,), (short,), limit in zip(free, capped, limits, strict=True):
        assert short.token_ids == long.token_ids[:limit]
        assert short.logprobs == pytest.approx(long.logprobs[:limit], abs=1e-5)
        if long.finish == "length":
            assert short.finish == "length"
            assert len(short.token_ids) == limit


def test_the_context_cuts_a_completion(make_engine):
    prompt = [9] * (CONTEXT - 3)
    (group,) = make_engine(stop_ids=[EOS]).generate([prompt], 4, SamplingParams(max_tokens=50))
    assert {(len(c.token_ids), c.finish) for c in group} == {(3, "length")}


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_a_prefix_that_fills_the_context_is_refused(make_engine, length):
    with pytest.raises(UserError, match=rf"{length} tokens.*context of {CONTEXT}.*max-context"):
        make_engine().generate([PROMPTS[0], [9] * length], 2, SamplingParams(max_tokens=5))


def test_a_sampled_end_token_is_kept_and_ends(make_engine):
    sampling = SamplingParams(max_tokens=40, seed=6)
    completions = [c for g in make_engine(7).generate(PROMPTS, 6, sampling) for c in g]
    assert {c.finish for c in completions} == {"stop", "length"}
    for c in completions:
        assert len(c.token_ids) == len(c.logprobs)
        ends = [i for i, t in enumerate(c.token_ids) if t in STOP_IDS]
        if c.finish == "stop":
            assert ends == [len(c.token_ids) - 1]
        else:
            assert not ends
            assert len(c.token_ids) == 40


@pytest.fixture
def write(make_engine, monkeypatch) -> Callable[..., Completion]:
    """Samples the tokens of a text, whatever the model says."""

    def write(text: str, max_tokens: int, *stop: str) -> Completion:
        ids = iter(tiny_tokenizer()(text)["input_ids"])

        def scripted(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([next(ids)]), torch.tensor([-0.5])

        monkeypatch.setattr(transformers_engine, "draw", scripted)
        sampling = SamplingParams(max_tokens=max_tokens, stop=stop)
        return make_engine(stop_ids=[EOS]).generate([PROMPTS[0]], 1, sampling)[0][0]

    return write


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("so 7\n\nmore", ("\n\n",), "so 7\n\n"),
        ("a END b", ("STOP", "END"), "a END"),
        ("ÄÖÜé! rest", ("é!",), "ÄÖÜé!"),  # characters of two tokens, cut at the window's edge
        ("日本語。次", ("。",), "日本語。"),
        ("</answer>x", ("</answer>",), "</answer>"),
    ],
)
def test_a_stop_string_ends_a_completion(write, text, stop, kept):
    completion = write(text, 30, *stop)
    assert tiny_tokenizer().decode(completion.token_ids) == kept
    assert completion.finish == "stop"
    assert len(completion.logprobs) == len(completion.token_ids)


def test_a_stop_string_on_the_last_token_is_a_stop(write):
    assert write("ab##cd", 4, "##").finish == "stop"


def test_a_completion_without_its_stop_string_is_cut(write):
    completion = write("ab#c#d", 6, "##")
    assert completion.finish == "length"
    assert len(completion.token_ids) == 6


def test_a_stop_string_is_looked_for_in_the_completion_only(make_engine):
    hashes = tiny_tokenizer()("####")["input_ids"]
    sampling = SamplingParams(max_tokens=6, stop=("##",))
    (completion,) = make_engine(stop_ids=[EOS]).generate([hashes], 1, sampling)[0]
    assert completion.finish == "length"
