"""GRPO's updates: learning, the gap between sampler and trainer, and steps that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.grpo_runs import QUICK, Train, adapter, rows, same
from rlsloth.losses.policy_loss import policy_loss
from rlsloth.records import LossOutput
from rlsloth.run.metrics import UpdateFigures
from rlsloth.training import grpo

pytestmark = pytest.mark.slow


# Learning


def test_the_policy_learns(train: Train) -> None:
    flags = "--steps 12 --prompts-per-step 8 --group-size 8 --updates-per-rollout 1 --optim.lr 0.01"
    folder = train("learns", *QUICK, *flags.split(), "--lora.rank", "8", "--lora.dropout", "0")
    rewards = [row["reward"] for row in rows(folder)]
    assert sum(rewards[:2]) / 2 < 0.2
    assert sum(rewards[-3:]) / 3 > 0.8


@pytest.fixture
def updates(monkeypatch) -> list[list[UpdateFigures]]:
    """Figures of each step's updates, in order."""
    seen: list[list[UpdateFigures]] = []
    original = grpo.update

    def spy(*arguments: Any) -> list[UpdateFigures]:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(grpo, "update", spy)
    return seen


def test_the_first_update_is_exactly_on_policy(train: Train, updates) -> None:
    train("on policy", *QUICK, "--updates-per-rollout", "3", "--optim.lr", "0.01")
    for first, *later in updates:
        assert first.stats.ratio == first.stats.tokens > 0
        assert first.stats.clipped_low == first.stats.clipped_high == 0
        assert len(later) == 2
        assert all(update.stats.ratio != update.stats.tokens for update in later)


def test_kl_starts_at_0_from_the_starting_policy(train: Train, updates) -> None:
    flags = (*QUICK, "--loss.beta", "0.1", "--loss.kl", "k3", "--lora.dropout", "0")
    fresh = train("kl", *flags)
    assert updates[0][0].stats.kl == 0
    assert all(row["kl"] > 0 for row in rows(fresh))
    updates.clear()
    continued = train("kl again", *flags, "--model.adapter", "kl/adapter")
    assert updates[0][0].stats.kl == 0  # to the starting adapter, not to the base
    assert all(row["kl"] > 0 for row in rows(continued))
    assert not same(adapter(continued), adapter(fresh))


@pytest.mark.parametrize(
    "flags",
    [
        "--loss.correction token_truncate",
        "--loss.correction token_mask --loss.correction-min 0.5",
        "--loss.correction sequence_truncate",
        "--loss.correction sequence_mask --loss.beta 0.05 --loss.kl k1",
        "--loss.name grpo --loss.beta 0.05 --loss.kl k2 --advantage.normalize batch",
        "--loss.name dr_grpo --advantage.normalize none --loss.mask-truncated",
        "--loss.name dapo --advantage.normalize leave_one_out --loss.delta 2",
        "--loss.name cispo --loss.overlong-buffer 4 --optim.schedule cosine",
        "--rollout.top-k 20 --rollout.top-p 0.9 --rollout.stop e f --model.precision bf16",
        "--rollout.temperature 0 --model.gradient-checkpointing false",
        "--rollout.cut-tail 0.6 --loss.mask-truncated --loss.gap-action correct",
    ],
)
def test_every_mode_trains_with_finite_figures(flags: str, train: Train, whole: Path) -> None:
    folder = train(f"mode{flags}", *QUICK, *flags.split())
    steps = rows(folder)
    assert len(steps) == 2
    for row in steps:
        # With greedy rollouts all of a group are alike: nothing trains, which leaves no means.
        idle = "--rollout.temperature 0" in flags
        missing = {name for name, value in row.items() if value is None}
        assert idle or not missing - {"completions/mean_terminated_length"}, missing
        assert row["skipped_updates"] == 0
    assert (sum(row["grad_norm"] for row in steps) > 0) != idle


def test_the_tail_is_cut_in_training_and_never_in_evaluations(train: Train, whole: Path) -> None:
    folder = train("cut", "--steps", "1", "--rollout.cut-tail", "0.3", "--eval.at-end", "false")
    assert rows(folder)[0]["completions/clipped_ratio"] > 0.5
    assert rows(whole)[0]["completions/clipped_ratio"] < 0.5
    figures = [rows(f, "eval_avg@4")[0] for f in (folder, whole)]
    assert figures[0] | {"eval_runtime": 0} == figures[1] | {"eval_runtime": 0}


# The gap between sampler and trainer: dropout makes one once the adapter is no longer zero

ALWAYS = ("--loss.gap-limit", "1e-12")
RATIO = "sampling/importance_sampling_ratio/mean"
GAP = "log-probs of trainer and sampler differ"
GAP_WARNING = f"warning: step 1: {GAP} by "


def test_a_wide_gap_is_warned_of_once(train: Train) -> None:
    folder = train("gap warned", *QUICK, *ALWAYS)
    assert (folder / "log.txt").read_text().count(GAP) == 1
    assert [row[RATIO] for row in rows(folder)] == [1, 1]


def test_a_wide_gap_is_corrected_from_the_next_step_on_and_after_a_resume(train: Train) -> None:
    flags = (*QUICK, *ALWAYS, "--loss.gap-action", "correct")
    folder = train("gap corrected", *flags)
    first, second = rows(folder)
    assert first[RATIO] == 1 != second[RATIO]
    log = (folder / "log.txt").read_text()
    assert log.count(GAP) == log.count(GAP_WARNING) == 1
    train("gap corrected", *flags, "--steps", "3", "--run.resume")
    assert rows(folder)[2][RATIO] != 1
    assert (folder / "log.txt").read_text().count(GAP_WARNING) == 2  # once a start


def test_a_wide_gap_stops_the_run_and_leaves_what_was_before(train: Train, capsys) -> None:
    flags = "--loss.gap-action stop --loss.gap-limit 1e-5 --run.save-every 1"
    folder = train("gap stopped", *QUICK, *flags.split(), status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: step 2: {GAP} by ")
    assert "--loss.gap-limit 1e-05" in line
    assert "--loss.gap-action correct" in line
    assert [p.name for p in (folder / "checkpoints").glob("step*")] == ["step_00001"]
    assert not (folder / "adapter").exists()
    train("gap stopped", *QUICK, "--run.resume")
    assert [row["step"] for row in rows(folder)] == [1, 2]


def test_a_rate_of_0_measures_and_changes_nothing(train: Train) -> None:
    folder = train("no rate", *QUICK, "--optim.lr", "0")
    assert all(row["grad_norm"] > 0 for row in rows(folder))
    assert not any(t.any() for name, t in adapter(folder).items() if "lora_B" in name)


# Steps that teach nothing


def test_equal_groups_change_nothing_and_say_why(train: Train) -> None:
    folder = train("flat", *QUICK, "--rewards", "./reward.py:flat")
    for row in rows(folder):
        assert (row["loss"], row["grad_norm"], row["frac_reward_zero_std"]) == (0, 0, 1)
        assert row["entropy"] is None  # no token was trained
    seeded = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, tensor in seeded.items():  # as PEFT made them: A random, B zero
        assert tensor.any() == ("lora_A" in name)
    log = (folder / "log.txt").read_text()
    assert log.count("warning: no gradient: every completion scored 0.5") == 1


@pytest.fixture
def spoil(monkeypatch) -> Callable[[set[int]], None]:
    """Makes the loss of some calls NaN."""

    def spoil(calls: set[int]) -> None:
        count = iter(range(10**6))

        def spoilt(*arguments: Any, **named: Any) -> LossOutput:
            out = original(*arguments, **named)
            if next(count) in calls:
                out.total = out.total * float("nan")
            return out

        original = policy_loss
        monkeypatch.setattr(grpo, "policy_loss", spoilt)

    return spoil


ONE_CALL = (*QUICK, "--updates-per-rollout", "1", "--tokens-per-microbatch", "4000")
"""One micro-batch and one update a step, so that policy_loss is called once a step."""


def test_a_non_finite_update_is_skipped_dumped_and_counted(train: Train, spoil) -> None:
    good = train("one good step", *ONE_CALL, "--steps", "1")
    spoil({1})
    folder = train("one bad step", *ONE_CALL)
    assert [row["skipped_updates"] for row in rows(folder)] == [0, 1]
    assert rows(folder)[1]["grad_norm"] is None
    assert same(adapter(folder), adapter(good))
    (dump,) = (folder / "skipped").iterdir()
    assert dump.name == "step_00002.safetensors"
    batch = load_file(dump)
    assert batch["0.target_ids"].shape == batch["0.advantages"].shape
    assert len(batch["0.token_ids"]) > 0
    log = (folder / "log.txt").read_text()
    assert "warning: step 2: the gradient is NaN or infinite; update skipped" in log


def test_too_many_skips_in_a_row_end_the_run(train: Train, spoil, capsys) -> None:
    spoil({0, 2, 3})  # one, then two in a row
    folder = train("bad steps", *ONE_CALL, "--steps", "9", "--optim.max-skipped", "2", status=2)
    assert [row["skipped_updates"] for row in rows(folder)] == [1, 0, 1, 1]
    assert len(list((folder / "skipped").iterdir())) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: the gradient was NaN or infinite for 2 steps in a row; lower --optim.lr"
    )
    assert not (folder / "summary.json").exists()
    assert (folder / "report.html").exists()


def test_skips_in_a_row_go_on_after_a_resume(train: Train, spoil, capsys) -> None:
    flags = (*ONE_CALL, "--optim.max-skipped", "3", "--run.save-every", "1")
    spoil({1, 2})
    train("skips resumed", *flags, "--steps", "3")
    spoil({0})
    train("skips resumed", *flags, "--steps", "5", "--run.resume", status=2)
    assert "3 steps in a row" in capsys.readouterr().err
