"""The diagnosis of a step, for each fault that it can name."""

from __future__ import annotations

import pytest

from rlsloth.records import Group, Prompt, Rollout, Score
from rlsloth.run.diagnosis import diagnose
from rlsloth.run.watch import WINDOW, Watch

NAMES = ["correct", "short"]


def make_group(scores, *, weights=(1.0, 1.0), truncated=(), failure=None):
    """Rollouts with these (correct, short) scores, and advantages r - mean as assign_advantages
    gives them."""
    rollouts = []
    for number, values in enumerate(scores):
        failed = failure if values[0] is None else None
        known = [w * v for w, v in zip(weights, values, strict=True) if v is not None]
        rollouts.append(
            Rollout(
                token_ids=[1, number],
                loss_mask=[True, True],
                logprobs=[-1.0, -1.0],
                policy_version=[0, 0],
                finish="length" if number in truncated else "stop",
                text="x",
                messages=[],
                scores=(
                    Score("correct", values[0], failed, "took too long" if failed else ""),
                    Score("short", values[1]),
                ),
                reward=sum(known) if known and not failed else None,
            )
        )
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    for rollout in rollouts:
        if rollout.reward is not None:
            rollout.advantages = [rollout.reward - sum(rewards) / len(rewards)] * 2
    return Group(Prompt(0, "q", {}), [1], rollouts)


MIXED = make_group([(1.0, 0.0), (0.0, 0.0)])
ZEROS = make_group([(0.0, 0.0), (0.0, 0.0)])
ONES = make_group([(1.0, 0.0), (1.0, 0.0)])


def only(groups, **kwargs):
    """The only sentence of a diagnosis."""
    (text,) = diagnose(groups, NAMES, kwargs.pop("mask_truncated", False), **kwargs)
    return text


def test_a_sound_step_has_no_warning():
    assert diagnose([MIXED, ZEROS], NAMES, True) == []


def test_all_zero_is_too_hard():
    assert "every completion scored 0 by correct and short: the task is too hard" in only(
        [ZEROS, ZEROS]
    )


def test_all_one_is_solved():
    assert "every completion scored 1 by correct and short: the task is solved" in only(
        [ONES, ONES]
    )


def test_equal_within_groups_only():
    assert "(1 at 0, 2 at 1 groups)" in only([ZEROS, ONES, ONES])


def test_equal_rewards_that_round_differently_are_equal():
    third = make_group([(1 / 3, 0.1 + 0.2), (1 / 3, 0.3)])
    assert "every completion scored 0.633333" in only([third])


def test_greedy_sampling_is_the_cause():
    copies = make_group([(0.0, 0.0), (0.0, 0.0)])
    for rollout in copies.rollouts:
        rollout.token_ids = [1, 2]
    assert "--rollout.temperature is 0" in only([copies], temperature=0.0)
    assert "--rollout.temperature 0.7: raise it" in only([copies], temperature=0.7)
    assert "the task is too hard" in only([copies, ZEROS])


def test_cancelling_rewards_are_named():
    group = make_group([(1.0, 0.0), (0.0, 1.0)])
    text = only([group, ZEROS])
    assert "correct and short vary within groups but their weighted sum does not" in text
    assert "--reward.weights" in text


def test_an_unweighted_reward_is_named():
    group = make_group([(0.0, 0.3), (0.0, 0.9)], weights=(1.0, 0.0))
    assert "short varies within groups but has no weight" in only([group])


def test_all_truncated_and_masked():
    group = make_group([(1.0, 0.0), (0.0, 0.0)], truncated=(0, 1))
    text = only([group], mask_truncated=True)
    assert "all 2 completions were cut off and are masked" in text
    assert "--rollout.max-tokens" in text


def test_all_truncated_but_not_masked_is_a_warning_only():
    group = make_group([(1.0, 0.0), (0.0, 0.0)], truncated=(0, 1))
    assert only([group]).startswith("2 of 2 completions hit the length limit")


def test_the_only_difference_is_masked():
    group = make_group([(0.5, 0.0), (1.0, 0.0), (0.0, 0.0)], truncated=(1, 2))
    texts = diagnose([group], NAMES, True)
    assert texts[0].startswith(
        "no gradient: the only completions that differ in reward were cut off and are masked"
    )


def test_half_truncated_is_not_yet_worth_a_warning():
    assert diagnose([make_group([(1.0, 0.0), (0.0, 0.0)], truncated=(0,))], NAMES, False) == []


@pytest.mark.parametrize(("truncated", "warned"), [(7, False), (8, False), (9, True)])
def test_a_tail_that_was_cut_on_purpose_did_not_hit_the_limit(truncated, warned):
    group = make_group([(1.0, 0.0), (0.0, 0.0)] * 5, truncated=range(truncated))
    watch = Watch(NAMES, False, cut_tail=0.3)
    texts = watch.step([group], metrics())
    assert texts == diagnose([group], NAMES, False, cut_tail=0.3)
    assert bool(texts) is warned
    if warned:
        assert texts[0].startswith(
            "2 of 3 completions hit the length limit, besides 7 that --rollout.cut-tail may have"
        )


def test_failed_rewards_are_named_with_kind_and_detail():
    group = make_group([(None, 0.5)] * 3, failure="timeout")
    first, second = diagnose([group], NAMES, False)
    assert "correct on 3 of 3 (timeout 3; e.g. took too long)" in first
    assert second == "no gradient: no completion has a reward"


def test_a_few_failures_are_mentioned_and_do_not_stop_learning():
    group = make_group([(None, 0.5), (1.0, 0.0), (0.0, 0.0)], failure="raised")
    assert "correct on 1 of 3 (raised 1" in only([group])


def test_inapplicable_rewards_are_named():
    text = only([make_group([(None, None)] * 2)])
    assert "correct, short applied to none" in text


# --- over time


def metrics(**changes):
    return {
        "reward": 0.5,
        "entropy": 1.0,
        "completions/mean_length": 100.0,
        "sampling/sampling_logp_difference/mean": 0.003,
        "loss": 1e-4,
        "grad_norm": 0.5,
    } | changes


def test_a_warning_is_printed_once_until_it_has_cleared():
    watch = Watch(NAMES, False)
    warnings = [watch.step([ZEROS], metrics()) for _ in range(3)]
    assert [len(texts) for texts in warnings] == [1, 0, 0]
    quiet = [watch.step([MIXED], metrics()) for _ in range(WINDOW)]
    assert quiet == [[]] * WINDOW
    assert len(watch.step([ZEROS], metrics())) == 1


def test_a_warning_that_flickers_is_not_repeated():
    watch = Watch(NAMES, False)
    warnings = [watch.step([group], metrics()) for group in (ZEROS, MIXED) * 10]
    assert sum(map(len, warnings)) == 1


@pytest.mark.parametrize(
    ("drift", "words"),
    [
        ({"entropy": 0.05}, "entropy fell from 1 to 0.05"),
        ({"completions/mean_length": 250.0}, "completions grew from 100 to 250 tokens"),
        ({"sampling/sampling_logp_difference/mean": 0.012}, "the gap between trainer and sampler"),
    ],
)
def test_trends(drift, words):
    watch = Watch(NAMES, False)
    for _ in range(WINDOW):
        assert watch.step([MIXED], metrics()) == []
    texts = [text for _ in range(WINDOW) for text in watch.step([MIXED], metrics(**drift))]
    assert len(texts) == 1
    assert words in texts[0]


@pytest.mark.parametrize("drift", [{"entropy": 0.05}, {"completions/mean_length": 250.0}])
def test_trends_are_fine_while_the_reward_rises(drift):
    watch = Watch(NAMES, False)
    for _ in range(WINDOW):
        watch.step([MIXED], metrics())
    assert [watch.step([MIXED], metrics(reward=0.9, **drift)) for _ in range(WINDOW)] == [
        []
    ] * WINDOW


def test_trends_keep_their_beginning_over_a_resume():
    history = [{"step": 0, "eval_accuracy": 0.2}, *(metrics() for _ in range(WINDOW))]
    watch = Watch(NAMES, False, history)
    texts = [t for _ in range(WINDOW) for t in watch.step([MIXED], metrics(entropy=0.01))]
    assert len(texts) == 1


def test_the_near_zero_loss_is_explained_once():
    watch = Watch(NAMES, False)
    assert watch.explain(metrics(grad_norm=0.0)) == []
    assert watch.explain(metrics(loss=0.4)) == []
    (text,) = watch.explain(metrics())
    assert "near 0 (1.0e-04) by construction" in text
    assert watch.explain(metrics()) == []
    assert Watch(NAMES, False, [metrics()]).explain(metrics()) == []


def test_rows_without_any_score_are_named():
    unread = make_group([(None, None), (None, None)])
    assert "1 of 2 prompts" in only([MIXED, unread])
    assert "row 1" in only([MIXED, unread])
