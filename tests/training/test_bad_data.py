"""A user's mistakes in data: status 2, and one line that says where and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.refusals import offline, write_rows

pytestmark = pytest.mark.slow


def test_missing_prompt_column(refused) -> None:
    write_rows("columns.jsonl", {"qestion": "1 + 1?", "gold": "2"})
    refused(
        "grpo --env.train columns.jsonl",
        "columns.jsonl",
        "prompt, question, problem",
        "--env.prompt-column",
        "qestion, gold",
    )


def test_named_prompt_column_is_missing(refused) -> None:
    refused(
        "grpo --env.prompt-column questoin",
        "data.jsonl has no column 'questoin'",
        "did you mean 'question'?",
    )


def test_column_that_a_reward_needs_is_missing(refused) -> None:
    refused(
        "grpo --rewards ./reward.py:wants_gold", "'wants_gold'", "needs a column 'gold'", "question"
    )


def test_empty_dataset(refused) -> None:
    Path("empty.jsonl").write_text("")
    refused("grpo --env.train empty.jsonl", "dataset 'empty.jsonl' (split 'train') has no rows")


def test_dataset_that_is_not_there(refused) -> None:
    refused("grpo --env.train dat.jsonl", "no data file dat.jsonl", "did you mean 'data.jsonl'?")


def test_malformed_row(refused) -> None:
    Path("torn.jsonl").write_text('{"question": "a"}\n{"question": \n')
    refused("grpo --env.train torn.jsonl", "torn.jsonl line 2")


def test_empty_prompt(refused) -> None:
    write_rows("blank.jsonl", {"question": "a"}, {"question": " "})
    refused("grpo --env.train blank.jsonl", "blank.jsonl row 2, column 'question'", "empty")


def test_hub_dataset_offline(refused, monkeypatch) -> None:
    offline(monkeypatch)
    refused(
        "grpo --env.train some-org/some-data",
        "'some-org/some-data'",
        "pass a .jsonl, .json or .parquet file",
    )


def test_prompt_longer_than_the_context(refused) -> None:
    rows = [{"question": "short"}, {"question": "long " * 40}]
    write_rows("long.jsonl", *rows)
    refused(
        "grpo --env.train long.jsonl --env.heldout 0",
        "prompt 2 has",
        "fills the model's context of 128",
        "--model.max-context",
    )


def test_held_out_prompt_longer_than_the_context(refused) -> None:
    """Refused before training, not by the evaluation after it."""
    write_rows("heldout.jsonl", {"question": "fine"}, {"question": "long " * 40})
    command = "grpo --env.validation heldout.jsonl --eval.at-end"
    refused(command, "prompt 2 has", "context of 128", "--model.max-context")


def test_prompt_and_completion_longer_than_a_microbatch(refused) -> None:
    command = "grpo --tokens-per-microbatch 40 --rollout.max-tokens 30"
    refused(command, "--tokens-per-microbatch 40", "raise it to")


def test_nothing_to_evaluate_on(refused) -> None:
    """Refused before training, not by the evaluation after it."""
    command = "grpo --env.heldout 0 --eval.at-end"
    refused(command, "no held-out problems", "--env.validation FILE", "--env.heldout")


def test_more_held_out_than_there_is(refused) -> None:
    refused("grpo --env.heldout 8", "--env.heldout 8 leaves nothing to train on", "8 distinct")
