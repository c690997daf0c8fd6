"""Policy losses by themselves: hand-computed values, gradients, splits, extremes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.micro_batches import make_batch, make_micro
from rlsloth.config import LossConfig
from rlsloth.losses.correction import correction_weight
from rlsloth.losses.kl import kl_estimate
from rlsloth.losses.policy_loss import normalizer
from rlsloth.losses.policy_loss import policy_loss as policy_loss_of
from rlsloth.losses.variants import VARIANTS
from rlsloth.records import LossOutput, MicroBatch

CORRECTIONS = ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def policy_loss(logprobs_N: Tensor, micro: MicroBatch, cfg: LossConfig, **more: Any) -> LossOutput:
    return policy_loss_of(VARIANTS[cfg.name], logprobs_N, micro, cfg, **more)


def total(
    logprobs_N: Tensor,
    micro: MicroBatch,
    cfg: LossConfig,
    old: Tensor | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    return policy_loss(
        logprobs_N, micro, cfg, old_logprobs_N=old, reference_logprobs_N=reference
    ).total


# Two rollouts of 1 and 2 tokens, advantages +1 and -2.
LENGTHS = [1, 2]
ADVANTAGES = torch.tensor([1.0, -2.0, -2.0])
LOGPROBS = torch.tensor([-1.0, -2.0, -3.0])


def test_on_policy_values_and_gradients_by_hand() -> None:
    micro = make_micro(LENGTHS, ADVANTAGES, LOGPROBS)
    per_token = [-1.0, 2.0, 2.0]  # -A, as ratio 1 has the gradient of the log-prob
    per_rollout = [-1.0, 1.0, 1.0]
    expected = {
        "grpo": (1.0, per_rollout),
        "gspo": (1.0, per_rollout),
        "dr_grpo": (3.0, per_token),
        "dapo": (3.0, per_token),
        "cispo": (1.0 - 4.0 - 6.0, per_token),  # sum of -A log p
    }
    assert set(expected) == set(VARIANTS)
    for name, (value, gradient) in expected.items():
        logprobs_N = LOGPROBS.clone().requires_grad_()
        loss = total(logprobs_N, micro, LossConfig(name=name))
        loss.backward()
        assert loss.item() == pytest.approx(value), name
        assert logprobs_N.grad.tolist() == pytest.approx(gradient), name


def test_normalizers_count_the_whole_step() -> None:
    batch = make_batch([], rollouts=8, scored_tokens=50)
    expected = {"grpo": 8, "gspo": 8, "dr_grpo": 8 * 16, "dapo": 50, "cispo": 50}
    for name, value in expected.items():
        assert normalizer(VARIANTS[name], batch, max_tokens=16) == value
    nothing = make_batch([], rollouts=8, scored_tokens=0)
    assert normalizer(VARIANTS["dapo"], nothing, max_tokens=16) == 1


def test_clipping_stops_the_gradient_on_the_right_side_only() -> None:
    ratios = torch.tensor([0.5, 0.5, 1.25, 1.25, 4.0])
    advantages_N = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    micro = make_micro([1] * 5, advantages_N, torch.zeros(5))
    cfg = LossConfig(name="dapo", epsilon_low=0.2, epsilon_high=0.28, delta=3.0)
    logprobs_N = ratios.log().requires_grad_()
    output = policy_loss(
        logprobs_N, micro, cfg, old_logprobs_N=torch.zeros(5), reference_logprobs_N=None
    )
    output.total.backward()
    # Kept low, clipped low, kept (clip-higher), kept high, capped by delta.
    assert logprobs_N.grad.tolist() == pytest.approx([-0.5, 0.0, -1.25, 1.25, 0.0])
    assert output.total.item() == pytest.approx(-0.5 + 0.8 - 1.25 + 1.25 + 3.0)
    assert (output.stats.clipped_low, output.stats.clipped_high) == (1, 0)
    assert output.stats.ratio == pytest.approx(ratios.sum().item())
    tighter = LossConfig(name="dapo", epsilon_low=0.2)  # the upper bound falls back to 0.2
    output = policy_loss(
        logprobs_N, micro, tighter, old_logprobs_N=torch.zeros(5), reference_logprobs_N=None
    )
    assert output.stats.clipped_high == 1


def test_cispo_caps_the_weight_and_keeps_the_gradient() -> None:
    micro = make_micro([3], torch.ones(3), torch.zeros(3))
    logprobs_N = torch.tensor([0.5, 4.0, 10.0]).log().requires_grad_()
    old = torch.zeros(3)
    output = policy_loss(
        logprobs_N, micro, LossConfig(name="cispo"), old_logprobs_N=old, reference_logprobs_N=None
    )
    output.total.backward()
    assert logprobs_N.grad.tolist() == pytest.approx([-0.5, -4.0, -5.0])
    assert output.stats.clipped_high == 1


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators(kind: Any) -> None:
    logprobs_N = torch.tensor([-1.0, -2.5, -0.3], dtype=torch.float64, requires_grad=True)
    reference_N = torch.tensor([-1.5, -0.5, -0.3], dtype=torch.float64)
    d = (reference_N - logprobs_N).detach()
    by_hand = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}
    slope = {"k1": torch.ones(3), "k2": -d, "k3": 1 - d.exp()}
    value_N = kl_estimate(logprobs_N, reference_N, kind)
    assert value_N.tolist() == pytest.approx(by_hand[kind].tolist(), abs=1e-12)
    value_N.sum().backward()
    assert logprobs_N.grad.tolist() == pytest.approx(slope[kind].tolist(), abs=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_ratio_weighted_kl_has_the_gradient_of_the_kl(kind: Any) -> None:
    """Summed over the whole vocabulary with its old probabilities, the estimate is the exact KL."""
    generator = torch.Generator().manual_seed(0)
    logits_V, old_V, reference_V = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    logits_V.requires_grad_()
    logprobs_V, old_V, reference_V = (x.log_softmax(-1) for x in (logits_V, old_V, reference_V))
    exact = (logprobs_V.exp() * (logprobs_V - reference_V)).sum()
    (wanted,) = torch.autograd.grad(exact, logits_V, retain_graph=True)
    ratio_V = (logprobs_V - old_V).exp()
    estimate = (old_V.exp() * ratio_V * kl_estimate(logprobs_V, reference_V, kind)).sum()
    (got,) = torch.autograd.grad(estimate, logits_V)
    assert estimate.item() == pytest.approx(exact.item())
    torch.testing.assert_close(got, wanted)


def test_kl_enters_the_loss_and_the_stats() -> None:
    micro = make_micro(LENGTHS, ADVANTAGES, LOGPROBS)
    reference, old = LOGPROBS + 0.3, LOGPROBS - 0.1
    kl = torch.full((3,), 0.3).expm1() - 0.3
    for weighted, factor in ((True, math.exp(0.1)), (False, 1.0)):
        cfg = LossConfig(name="dapo", beta=0.5, kl_ratio_weighted=weighted)
        output = policy_loss(
            LOGPROBS, micro, cfg, old_logprobs_N=old, reference_logprobs_N=reference
        )
        expected_kl = factor * kl.sum().item()
        assert output.stats.kl == pytest.approx(expected_kl, rel=1e-5)
        assert output.total.item() == pytest.approx(
            output.stats.policy + 0.5 * expected_kl, rel=1e-5
        )


def test_correction_weights_by_hand() -> None:
    old_N = torch.zeros(4)
    rollout_N = -torch.tensor([2.0, 4.0, 0.1, 0.5]).log()  # ratios per token; products 8 and 0.05
    micro = make_micro([2, 2], torch.ones(4), rollout_N)
    expected = {
        "none": ([1, 1, 1, 1], 0),
        "token_truncate": ([2, 3, 0.2, 0.5], 2),
        "token_mask": ([2, 0, 0, 0.5], 2),
        "sequence_truncate": ([3, 3, 0.2, 0.2], 4),
        "sequence_mask": ([0, 0, 0, 0], 4),
    }
    for mode, (weights, corrected) in expected.items():
        cfg = LossConfig(correction=mode, correction_max=3.0, correction_min=0.2)
        weight_N, corrected_N = correction_weight(old_N, micro, cfg)
        assert weight_N.tolist() == pytest.approx(weights), mode
        assert int(corrected_N.sum()) == corrected, mode
    unbounded_below = LossConfig(correction="token_mask", correction_max=9.0)
    weight_N, _ = correction_weight(old_N, micro, unbounded_below)
    assert weight_N.tolist() == pytest.approx([2.0, 4.0, 0.1, 0.5])


def test_unknown_rollout_logprobs_are_neutral() -> None:
    rollout_N = torch.tensor([math.nan, -math.log(2.0)])
    micro = make_micro([2], torch.ones(2), rollout_N)
    for mode, weights in (("token_truncate", [1.0, 2.0]), ("sequence_mask", [2.0, 2.0])):
        weight_N, corrected_N = correction_weight(
            torch.zeros(2), micro, LossConfig(correction=mode)
        )
        assert weight_N.tolist() == pytest.approx(weights)
        assert not corrected_N.any()


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_extreme_logprobs_leave_finite_gradients(name: str, correction: str) -> None:
    gaps_N = torch.tensor([1e4, -1e4, 0.0, 90.0, -90.0, 1e4, 3.0, -3.0])
    rollout_N = torch.tensor([-math.inf, math.nan, -1e4, 1e4, math.nan, -math.inf, 0.0, -2.0])
    for ratio in (None, "token", "sequence"):
        for sign in (1.0, -1.0):
            for kl in ("k1", "k2", "k3"):
                micro = make_micro([3, 3, 2], sign * torch.ones(8), rollout_N)
                logprobs_N = torch.full((8,), -2.0, requires_grad=True)
                cfg = LossConfig(name=name, ratio=ratio, correction=correction, beta=0.1, kl=kl)
                output = policy_loss(
                    logprobs_N,
                    micro,
                    cfg,
                    old_logprobs_N=-2.0 - gaps_N,
                    reference_logprobs_N=-2.0 + gaps_N.flip(0),
                )
                output.total.backward()
                assert torch.isfinite(output.total)
                assert logprobs_N.grad is not None
                assert torch.isfinite(logprobs_N.grad).all()
                assert math.isfinite(output.stats.ratio)
                assert math.isfinite(output.stats.correction)


@pytest.mark.parametrize("name", VARIANTS)
def test_empty_micro_batch_is_a_differentiable_zero(name: str) -> None:
    micro = make_micro([], torch.zeros(0), torch.zeros(0))
    logprobs_N = torch.zeros(0, requires_grad=True)
    cfg = LossConfig(name=name, beta=0.1, correction="sequence_mask")
    output = policy_loss(
        logprobs_N, micro, cfg, old_logprobs_N=None, reference_logprobs_N=torch.zeros(0)
    )
    output.total.backward()
    assert output.total.item() == 0
    assert output.stats.tokens == 0


def test_only_the_policy_gets_a_gradient() -> None:
    micro = make_micro(LENGTHS, ADVANTAGES, LOGPROBS)
    logprobs_N, old_N, reference_N = ((LOGPROBS + s).requires_grad_() for s in (0.0, 0.1, 0.2))
    cfg = LossConfig(name="grpo", beta=0.1, correction="token_truncate")
    total(logprobs_N, micro, cfg, old_N, reference_N).backward()
    assert logprobs_N.grad is not None
    assert old_N.grad is None
    assert reference_N.grad is None


def test_stats_count_tokens_and_correction() -> None:
    micro = make_micro(LENGTHS, ADVANTAGES, LOGPROBS - torch.tensor([0.0, 2.0, 0.0]))
    cfg = LossConfig(name="dapo", correction="token_mask", correction_max=3.0)
    stats = policy_loss(LOGPROBS, micro, cfg, old_logprobs_N=None, reference_logprobs_N=None).stats
    assert (stats.tokens, stats.ratio, stats.correction, stats.corrected) == (3, 3.0, 2.0, 1)
    assert stats.policy == pytest.approx(-1.0 + 2.0)
    off = policy_loss(
        LOGPROBS, micro, LossConfig(), old_logprobs_N=None, reference_logprobs_N=None
    ).stats
    assert off.correction == off.tokens


@st.composite
def steps_and_cuts(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    cuts = draw(st.lists(st.integers(0, len(lengths)), max_size=4))
    return lengths, sorted(cuts), draw(st.integers(0, 2**16))


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(case=steps_and_cuts(), correction=st.sampled_from(CORRECTIONS))
def test_gradient_does_not_depend_on_the_split(
    name: str, on_policy: bool, case: tuple[list[int], list[int], int], correction: str
) -> None:
    lengths, cuts, seed = case
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    values_N, noise_N, rollout_N, reference_N = 0.3 * torch.randn(4, count, generator=generator)
    values_N = values_N - 2
    advantages_N = torch.repeat_interleave(
        torch.randn(len(lengths), generator=generator), torch.tensor(lengths)
    )
    cfg = LossConfig(name=name, beta=0.1, correction=correction, correction_max=1.5)

    def gradient(bounds: list[int]) -> Tensor:
        logprobs_N = values_N.clone().requires_grad_()
        pieces = []
        for first, last in pairwise(bounds):
            span = slice(sum(lengths[:first]), sum(lengths[:last]))
            micro = make_micro(
                lengths[first:last], advantages_N[span], (values_N + rollout_N)[span]
            )
            pieces.append((micro, span))
        batch = make_batch([m for m, _ in pieces], len(lengths) + 1, count + 3)
        divisor = normalizer(VARIANTS[name], batch, max_tokens=12)
        for micro, span in pieces:
            old = None if on_policy else (values_N + noise_N)[span]
            reference = (values_N + reference_N)[span]
            (total(logprobs_N[span], micro, cfg, old, reference) / divisor).backward()
        return logprobs_N.grad

    whole, cut = gradient([0, len(lengths)]), gradient([0, *cuts, len(lengths)])
    assert (whole - cut).abs().max() <= 1e-6
    assert whole.abs().max() > 0
