"""Memory that runs out at random operations of an update: the step is made all the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from helpers.out_of_memory import (
    MODULES,
    TOKENS,
    Exhausted,
    live_tensors,
    numbers_of,
    run_out,
    update_of,
    weights_of,
)
from helpers.policies import make_groups, make_policy
from rlsloth.data.packing import longest_stream, pack, regroup
from rlsloth.memory.modes import most_frugal
from rlsloth.policy.activations.placement import uniform
from rlsloth.policy.policy import Policy
from rlsloth.training import gradients
from rlsloth.training.gradients import Budget

pytestmark = pytest.mark.slow

Update = tuple[dict[str, torch.Tensor], Any, list[str], Policy, Budget, int]


def disturbed(kind: str, at: list[int], *, collect: bool = False) -> Update:
    """Make an update in which memory runs out at these operations.

    ``collect``: collect garbage after a failure as a run does, which takes more than a second.
    """
    policy = make_policy(dropout=0.2 if kind in ("sft", "grpo") else 0.0)
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        mode = Exhausted(at, run_out)
        mode.patch(patch, MODULES[kind])
        if not collect:
            patch.setattr(gradients, "free_memory", lambda: None)
        figures, budget = update_of(kind, policy, warnings.append)
    assert not mode.at, "the update has fewer operations"
    return weights_of(policy), figures, warnings, policy, budget, mode.count


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Update]:
    return {kind: disturbed(kind, []) for kind in MODULES}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", MODULES)
def test_the_same_step_after_failures_at_random_operations(
    kind: str, seed: int, undisturbed: dict[str, Update]
) -> None:
    weights, figures, none, _, _, operations = undisturbed[kind]
    assert none == []
    draw = random.Random(f"{kind} {seed}")
    most = operations // (2 if kind == "grpo" else 1)  # grpo makes two updates
    at = [draw.randint(1, most) for _ in range(1 + seed % 2)]
    found, again, warnings, policy, budget, _ = disturbed(kind, at)
    assert len(warnings) == len(at)
    assert budget.tokens == TOKENS
    assert policy.version == (2 if kind == "grpo" else 1)
    assert again == figures
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws other numbers for other micro-batches."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda _, x: x)


@pytest.mark.parametrize("failures", [3, 4])
@pytest.mark.parametrize("kind", MODULES)
def test_smaller_micro_batches_make_the_same_step(
    kind: str, failures: int, no_dropout: None
) -> None:
    weights, figures, *_ = disturbed(kind, [])
    found, again, warnings, _, budget, _ = disturbed(kind, [40] * failures)
    assert "inputs in host memory" in warnings[1]
    assert f"in micro-batches of {budget.tokens} tokens" in warnings[-1]
    assert budget.tokens < TOKENS
    assert numbers_of(again) == pytest.approx(numbers_of(figures), rel=1e-4, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_second_update_that_fails_keeps_the_log_probs_of_the_first(no_dropout: None) -> None:
    weights, figures, _, _, _, operations = disturbed("grpo", [])
    found, again, warnings, *_ = disturbed("grpo", [operations * 3 // 4, 40, 40])
    assert "micro-batches of" in warnings[2]
    assert again[0] == figures[0]
    assert numbers_of(again) == pytest.approx(numbers_of(figures), rel=1e-4, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_it_is_an_error_if_no_rollout_fits_alone(kind: str) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        disturbed(kind, [40] * 50)


@pytest.mark.slow
def test_a_failed_update_leaves_no_tensors() -> None:
    counts = []
    for at in ([], [300], [300, 100], [300, 100, 40]):
        policy = disturbed("sft", at, collect=True)[3]
        policy.place(uniform(True, len(policy.placements)))  # host memory stays for the next one
        counts.append(live_tensors())
        del policy
    assert len(set(counts)) == 1, counts


# Smaller micro-batches


def test_a_budget_is_halved_until_each_rollout_is_alone() -> None:
    def make(tokens: int) -> Any:
        return pack(groups, tokens, mask_truncated=False, keep_zero_advantage=True)

    groups = make_groups(2, 5)
    least = longest_stream(make(1))
    budget, batch = Budget(200), make(200)
    shrink, seen = budget.shrinking(make), [200]
    while (smaller := shrink(batch)) is not None:
        assert longest_stream(smaller) < longest_stream(batch)
        assert smaller.trained_tokens == batch.trained_tokens
        batch = smaller
        seen.append(budget.tokens)
    assert budget.tokens == batch.budget == least
    assert seen == sorted(seen, reverse=True)


def test_values_are_distributed_over_other_micro_batches() -> None:
    groups = make_groups(4, 6)
    large, small = (
        pack(groups, tokens, mask_truncated=False, keep_zero_advantage=True) for tokens in (150, 30)
    )
    assert len(large.microbatches) < len(small.microbatches)
    values = [micro.rollout_logprobs for micro in large.microbatches]
    found = regroup(values, large, small)
    for micro, value in zip(small.microbatches, found, strict=True):
        assert torch.equal(value, micro.rollout_logprobs)


def test_a_policy_that_is_frugal_already_is_not_placed_again() -> None:
    policy = make_policy()
    policy.place(most_frugal(policy.backend, len(policy.placements)))
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        Exhausted([40, 40], run_out).patch(patch, MODULES["sft"])
        _, budget = update_of("sft", policy, warnings.append)
    assert budget.tokens < TOKENS
    assert f"{budget.tokens} tokens" in warnings[1]
