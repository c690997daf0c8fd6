"""The packed forward compared with the model's own forward, and with other ways to cut a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.policies import make_groups, make_policy, one_by_one
from rlsloth.config import LossConfig
from rlsloth.data.packing import pack
from rlsloth.losses.policy_loss import normalizer, policy_loss
from rlsloth.losses.variants import VARIANTS
from rlsloth.policy.attention import layout as packed_layout
from rlsloth.policy.policy import Policy
from rlsloth.records import Group
from rlsloth.run import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tree_limit", [packed_layout.TREE_LIMIT, 0], ids=["trees", "sequences"])
def test_packed_equals_one_by_one(temperature, tree_limit, monkeypatch):
    monkeypatch.setattr(packed_layout, "TREE_LIMIT", tree_limit)
    policy = make_policy(temperature)
    groups = make_groups(1)
    batch = pack(groups, 64, mask_truncated=False, keep_zero_advantage=True)
    assert len(batch.microbatches) > 1
    seen = 0
    for micro in batch.microbatches:
        out = policy.logprobs(micro).logprobs
        for r, (g, i) in enumerate(micro.source):
            want = one_by_one(policy, groups[g], groups[g].rollouts[i], temperature)
            got = out[micro.rollout_of == r]
            assert (got - want).abs().max() <= 1e-5
            seen += 1
    assert seen == sum(len(g.rollouts) for g in groups)


def gradient(
    policy: Policy, groups: list[Group], budget: int, cfg: LossConfig
) -> dict[str, torch.Tensor]:
    batch = pack(groups, budget, mask_truncated=False, keep_zero_advantage=cfg.beta > 0)
    loss = VARIANTS[cfg.name]
    norm = normalizer(loss, batch, max_tokens=12)
    for micro in batch.microbatches:
        reference = policy.reference_logprobs(micro) if cfg.beta else None
        out = policy.logprobs(micro)
        old = micro.rollout_logprobs  # far from on-policy: clipping takes part
        output = policy_loss(
            loss, out.logprobs, micro, cfg, old_logprobs_N=old, reference_logprobs_N=reference
        )
        (output.total / norm).backward()
    grads = {n: p.grad.clone() for n, p in policy.weights().tensors.items()}
    policy.optimizer.zero_grad()
    return grads


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    budget=st.integers(24, 120),
    name=st.sampled_from(list(VARIANTS)),
    beta=st.sampled_from([0.0, 0.1]),
)
def test_gradient_does_not_depend_on_the_split(seed, budget, name, beta):
    policy = make_policy()
    groups = make_groups(seed)
    cfg = LossConfig(name=name, beta=beta)
    whole = gradient(policy, groups, 10_000, cfg)
    split = gradient(policy, groups, budget, cfg)
    for n, want in whole.items():
        assert (split[n] - want).abs().max() <= 1e-6, n


def test_checkpointing_changes_nothing():
    groups = make_groups(3)
    plain = gradient(make_policy(), groups, 80, LossConfig())
    recomputed = gradient(make_policy(checkpointing=True), groups, 80, LossConfig())
    for n, want in plain.items():
        torch.testing.assert_close(recomputed[n], want, rtol=0, atol=1e-7)


def test_zero_advantage_rollouts_cost_nothing_and_change_nothing():
    groups = make_groups(4)
    for rollout in groups[0].rollouts:
        rollout.advantages = [0.0] * len(rollout.token_ids)
    kept = pack(groups, 1000, mask_truncated=False, keep_zero_advantage=True)
    dropped = pack(groups, 1000, mask_truncated=False, keep_zero_advantage=False)
    assert dropped.trained_tokens < kept.trained_tokens == kept.scored_tokens
    assert dropped.scored_tokens == kept.scored_tokens
    assert dropped.rollouts == kept.rollouts == 12


def test_non_finite_gradient_updates_nothing():
    policy = make_policy()
    before = {n: p.detach().clone() for n, p in policy.weights().tensors.items()}
    for p in policy.weights().tensors.values():
        p.grad = torch.full_like(p, float("nan"))
    stats = policy.step()
    assert stats.skipped
    assert policy.version == 0
    for n, p in policy.weights().tensors.items():
        assert torch.equal(p, before[n])
        assert p.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_state_round_trip_continues_bit_exactly(optimizer, tmp_path):
    groups = make_groups(5)
    # Rank 128: bitsandbytes keeps tensors below 4,096 elements in 32 bits.
    one, two = (make_policy(optimizer=optimizer, rank=128) for _ in range(2))

    def update(policy: Policy) -> None:
        for n, g in gradient(policy, groups, 100, LossConfig()).items():
            policy.weights().tensors[n].grad = g
        policy.step()

    update(one)
    checkpoint.save(tmp_path, 1, *one.state(), keep=1)
    saved = checkpoint.load_latest(tmp_path)
    two.restore(saved.tensors, saved.state)
    update(one)
    update(two)
    assert one.version == two.version == 2
    for n, p in one.weights().tensors.items():
        assert torch.equal(p, two.weights().tensors[n]), n


def test_reference_is_the_policy_before_training():
    policy = make_policy()
    batch = pack(make_groups(6), 1000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    base = policy.reference_logprobs(micro)
    with policy.model.disable_adapter():
        want = policy.logprobs(micro).logprobs
    assert torch.equal(base, want)
    assert not torch.equal(policy.logprobs(micro).logprobs, base)


def test_the_schedule_counts_planned_updates():
    policy = make_policy(schedule="linear")
    rates = []
    for idle in (True, True, False, True):
        if idle:
            rates.append(policy.idle().learning_rate)
        else:
            for p in policy.weights().tensors.values():
                p.grad = torch.ones_like(p)
            rates.append(policy.step().learning_rate)
    assert policy.version == 1
    assert rates == pytest.approx([2e-5 * (1 - i / 10) for i in range(4)])


def test_the_warm_up_wastes_no_update():
    policy = make_policy(schedule="linear", warmup_steps=4)
    rates = [policy.idle().learning_rate for _ in range(6)]
    after = [1.0, 5 / 6]  # linear: from the end of the warm-up to 0 at update 10
    assert rates == pytest.approx([2e-5 * f for f in (0.25, 0.5, 0.75, 1.0, *after)])
    assert make_policy(warmup_steps=1).idle().learning_rate == pytest.approx(2e-5)


def test_squares_hold_little_padding():
    """One long tree among many short ones does not pad them all to its length."""
    groups = make_groups(7, groups=20)
    long = groups[0].rollouts[0]
    long.token_ids, long.logprobs = [5] * 600, [0.0] * 600
    long.loss_mask, long.policy_version = [True] * 600, [0] * 600
    long.advantages = [1.0] * 600
    (micro,) = pack(groups, 10**6, mask_truncated=False, keep_zero_advantage=True).microbatches
    layout = packed_layout.PackedLayout(micro, "sdpa")
    sizes = [len(g.prompt_ids) + sum(len(r.token_ids) - 1 for r in g.rollouts) for g in groups]
    squares = sum(b.mask.numel() for b in layout.buckets)
    assert squares <= 4 * sum(max(size, 16) ** 2 for size in sizes)
