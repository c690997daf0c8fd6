"""The heaviest micro-batch, tried before step 1: what it changes, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers.policies import VOCAB, make_policy
from rlsloth.data.packing import longest_stream
from rlsloth.memory.activations import Stream
from rlsloth.policy.activations.placement import describe
from rlsloth.policy.policy import Policy
from rlsloth.records import MicroBatch, TokenLogprobs
from rlsloth.training import gradients
from rlsloth.training.gradients import Budget
from rlsloth.training.heaviest import LEAST, Heaviest, _random_batch, try_heaviest

HEAVIEST = Heaviest(Stream(20, 50, 4), 300, "update")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "free_memory", lambda: None)


def limit(policy: Policy, tokens: Callable[[], int]) -> list[int]:
    """Let memory run out in micro-batches of more than so many tokens; note their tokens."""
    logprobs, seen = policy.logprobs, []

    def limited(micro: MicroBatch) -> TokenLogprobs:
        seen.append(len(micro.token_ids))
        out = logprobs(micro)
        if seen[-1] > tokens():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    policy.logprobs = limited
    return seen


def tried(
    policy: Policy, tokens: int, heaviest: Heaviest = HEAVIEST
) -> tuple[Budget, list[str], list[str]]:
    budget = Budget(tokens)
    lines: tuple[list[str], list[str]] = [], []
    try_heaviest(policy, heaviest, budget, lines[0].append, lines[1].append)
    return budget, *lines


@pytest.mark.parametrize("stream", [Stream(20, 50, 4), Stream(0, 90, 1), Stream(7, 1, 2)])
@pytest.mark.parametrize("tokens", [1, 2, 21, 64, 220, 221, 500])
def test_a_micro_batch_has_exactly_so_many_tokens(stream: Stream, tokens: int) -> None:
    batch = _random_batch(stream, VOCAB, tokens)
    assert len(batch.microbatches) == 1
    assert longest_stream(batch) == tokens
    assert int(batch.microbatches[0].token_ids.max()) < VOCAB


def test_nothing_remains_of_a_trial_that_fits() -> None:
    policy = make_policy(dropout=0.3)
    torch.manual_seed(5)
    before = {n: p.detach().clone() for n, p in policy.weights().tensors.items()}
    state, placements = torch.get_rng_state(), policy.placements
    seen = limit(policy, lambda: 500)
    budget, said, warned = tried(policy, 500)
    assert (seen, budget.tokens, said, warned) == ([500], 500, [], [])
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.version == 0
    assert policy.placements == placements
    _, values = policy.state()
    assert {name: v for name, v in values["optimizer"].items() if v} == {}
    for name, state in policy.state()[0]["optimizer"].items():
        assert not state.any(), name
    for name, weight in policy.weights().tensors.items():
        assert weight.grad is None
        assert torch.equal(weight, before[name])


def test_frugal_placements_come_before_smaller_micro_batches() -> None:
    policy = make_policy()
    plain = policy.placements
    seen = limit(policy, lambda: 0 if policy.placements == plain else 500)
    budget, _, (warning,) = tried(policy, 500)
    assert (seen, budget.tokens) == ([500] * 3, 500)
    assert describe(policy.placements) in warning
    assert "500 tokens" in warning


def test_the_budget_is_not_halved_past_the_longest_sequence_before_that_was_tried() -> None:
    policy = make_policy()
    seen = limit(policy, lambda: 310)
    budget, _, (warning,) = tried(policy, 500)
    assert seen == [500, 500, 500, 300]
    assert budget.tokens == 300
    assert "micro-batches of 300 tokens" in warning
    assert "--tokens-per-microbatch" not in warning


def test_a_longest_sequence_that_does_not_fit_is_a_warning_with_advice() -> None:
    policy = make_policy()
    seen = limit(policy, lambda: 160)
    budget, _, (warning,) = tried(policy, 500)
    assert seen[-2:] == [300, 150]
    assert budget.tokens == 150
    assert "may have 300 tokens" in warning
    assert "lower --tokens-per-microbatch" in warning


def test_it_is_an_error_if_next_to_nothing_fits() -> None:
    policy = make_policy()
    seen = limit(policy, lambda: 0)
    with pytest.raises(torch.OutOfMemoryError):
        tried(policy, 500)
    assert seen[-1] == LEAST
    assert all(weight.grad is None for weight in policy.weights().tensors.values())


def test_states_of_the_optimizer_and_gradients_are_there_during_the_trial() -> None:
    policy = make_policy()
    logprobs, trained = policy.logprobs, policy.weights().tensors.values()
    seen = []

    def checked(micro: MicroBatch) -> TokenLogprobs:
        assert all(weight.grad is not None for weight in trained)
        seen.append(sum(len(policy.optimizer.state[weight]) for weight in trained))
        return logprobs(micro)

    policy.logprobs = checked
    tried(policy, 100)
    assert seen == [3 * len(trained)]


def test_seconds_are_said_if_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 61.0])
    monkeypatch.setattr("rlsloth.training.heaviest.time.monotonic", lambda: next(times))
    _, said, _ = tried(make_policy(), 100)
    assert "61 s" in said[0]
    assert len(said) == 1
