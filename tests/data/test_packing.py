"""Packing: each scored token's advantage reaches the loss and the gradient."""

from __future__ import annotations

import pytest
import torch

from rlsloth.config import LossConfig
from rlsloth.data.packing import pack
from rlsloth.losses.policy_loss import normalizer, policy_loss
from rlsloth.losses.variants import VARIANTS
from rlsloth.records import Group, Prompt, Rollout

ADVANTAGES = [0.5, -2.0, 0.0, 3.0, 0.25]
SAMPLED = [True, True, False, True, True]


def make_rollout(advantages: list[float]) -> Rollout:
    return Rollout(
        token_ids=[11, 12, 13, 14, 15],
        loss_mask=SAMPLED,
        logprobs=[-1.0, -2.0, 0.0, -0.5, -3.0],
        policy_version=[0, 0, -1, 0, 0],
        finish="stop",
        text="",
        messages=[],
        advantages=advantages,
    )


def make_group(*advantages: list[float]) -> Group:
    return Group(Prompt(0, "", {}), [5, 6], [make_rollout(values) for values in advantages])


@pytest.mark.parametrize("others", [[], [[1.0, 1.0, 0.0, 1.0, 1.0]]], ids=["alone", "in a tree"])
def test_each_token_keeps_its_own_advantage(others: list[list[float]]) -> None:
    group = make_group(ADVANTAGES, *others)
    (micro,) = pack([group], 100, mask_truncated=False, keep_zero_advantage=False).microbatches
    mine = micro.rollout_of == 0
    assert micro.advantages.dtype == torch.float32
    assert micro.target_ids[mine].tolist() == [11, 12, 14, 15]
    assert micro.advantages[mine].tolist() == [0.5, -2.0, 3.0, 0.25]


def test_the_policy_gradient_weighs_each_token_by_its_advantage() -> None:
    batch = pack([make_group(ADVANTAGES)], 100, mask_truncated=False, keep_zero_advantage=False)
    (micro,) = batch.microbatches
    dapo = VARIANTS["dapo"]
    logprobs = micro.rollout_logprobs.clone().requires_grad_(True)
    total = policy_loss(
        dapo, logprobs, micro, LossConfig(), old_logprobs_N=None, reference_logprobs_N=None
    ).total
    loss = total / normalizer(dapo, batch, max_tokens=10)
    torch.autograd.backward(loss)
    # On-policy the ratio is 1: loss = -mean(A), and its derivative by token t is -A[t] / N.
    want = torch.tensor([0.5, -2.0, 3.0, 0.25])
    assert loss.item() == pytest.approx(-want.mean().item())
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -want / 4)


def test_a_rollout_is_left_out_only_when_every_advantage_is_zero() -> None:
    group = make_group([0.0] * 5, [0.0, 0.0, 0.0, 0.0, 1.0], [])
    batch = pack([group], 100, mask_truncated=False, keep_zero_advantage=False)
    (micro,) = batch.microbatches
    assert micro.source == ((0, 1),)
    assert (batch.rollouts, batch.scored_tokens, batch.trained_tokens) == (3, 12, 4)
    kept = pack([group], 100, mask_truncated=False, keep_zero_advantage=True)
    assert kept.trained_tokens == 12
    assert kept.microbatches[0].advantages.tolist() == [0.0] * 7 + [1.0] + [0.0] * 4
