"""A user's mistakes in rewards, environments and options: status 2, and one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow


def test_all_is_well_otherwise(sound_folder: Path) -> None:
    assert cli.main(["grpo", "config.yaml", "--run.dir", "fine"]) == 0
    (row,) = map(json.loads, Path("fine/metrics.jsonl").read_text().splitlines())
    assert row["reward"] == 0.5


# Rewards and environments


def test_unknown_reward(refused) -> None:
    refused("grpo --rewards math_verfy", "'math_verfy'", "did you mean 'math_verify'?")


def test_no_reward(refused) -> None:
    refused("grpo --rewards", "--rewards is empty", "--rewards NAME", "rlsloth rewards list")


def test_unknown_function_in_a_reward_file(refused) -> None:
    refused("grpo --rewards ./reward.py:one", "no 'one'", "did you mean 'ones'?")


def test_unknown_eval_reward(refused) -> None:
    refused("grpo --eval.reward two", "--eval.reward 'two' is not among --rewards ones")


def test_unknown_environment(refused) -> None:
    refused("grpo --env.name calculater", "'calculater'", "did you mean 'calculator'?")


@pytest.mark.parametrize(("name", "kind"), [("long", "wrong length"), ("raises", "raised")])
def test_a_failing_reward_is_counted_and_training_goes_on(name, kind, sound_folder) -> None:
    rewards = ["--rewards", "./reward.py:ones", f"./reward.py:{name}"]
    assert cli.main(["grpo", "config.yaml", *rewards, "--run.dir", name]) == 0
    (row,) = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
    assert row[f"rewards/{name}/failures"] == 4
    assert row["rewards/ones/failures"] == 0
    assert row["reward"] is None  # a failure is never a zero
    assert f"{name} on 4 of 4 ({kind} 4" in Path(name, "log.txt").read_text()


# Options


def test_group_size_1(refused) -> None:
    refused("grpo --group-size 1", "--group-size", "2")


def test_typo_in_a_flag(refused) -> None:
    refused("grpo --optim.learning_rat 1", "--optim.learning_rat")
    refused("grpo --optim.warmup_step 1", "did you mean '--optim.warmup-steps'?")


def test_typo_in_a_yaml_key(refused) -> None:
    Path("typo.yaml").write_text("optim:\n  warmup_step: 3\n")
    refused("grpo typo.yaml", "typo.yaml", "optim.warmup_step", "did you mean", "warmup_steps")


def test_value_of_the_wrong_kind(refused) -> None:
    refused("grpo --optim.lr fast", "--optim.lr", "fast", "number")
