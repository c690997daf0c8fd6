"""Warnings of GRPO that name the setting behind a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.grpo_runs import QUICK, Train, rows

pytestmark = pytest.mark.slow

OPENED = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def thinking(workplace: Path) -> str:
    """The model with a chat template that opens <think> for each completion."""
    folder = workplace / "thinking"
    folder.mkdir()
    for file in (workplace / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = folder / "chat_template.jinja"
    text = template.read_text()
    assert OPENED in text
    template.write_text(text.replace(OPENED, f"{OPENED}<think>\n"))
    return str(folder)


@pytest.mark.parametrize("told", [False, True])
def test_a_tag_that_the_template_opens_is_named(told: bool, thinking: str, train: Train) -> None:
    option = ["--reward.params.format_tags", "first_tag_open", "true"] if told else []
    rewards = ["--rewards", "format_tags", "./reward.py:letters"]
    run = train(f"open{told}", "--model.path", thinking, *rewards, *QUICK, *option)
    log = (run / "log.txt").read_text()
    assert "the prompt ends with <think>" in log
    assert ("--reward.params.format_tags first_tag_open true" in log) is not told


def test_greedy_sampling_is_named_and_evaluated_once(train: Train) -> None:
    cold = ["--rollout.temperature", "0", "--eval.temperature", "0", "--steps", "1"]
    run = train("greedy", *cold, "--eval.at-start", "false")
    assert "--rollout.temperature is 0" in (run / "log.txt").read_text()
    (row,) = rows(run, "eval_avg@1")
    assert "eval_avg@4" not in row
    assert "accuracy_after" in json.loads((run / "summary.json").read_text())
