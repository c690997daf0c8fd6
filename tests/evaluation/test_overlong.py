"""Prompts longer than ``env.max_prompt_tokens`` are left out, and the refusal names the option."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from helpers.examples import renderer
from rlsloth.config import EnvConfig
from rlsloth.data.prompts import make_prompts
from rlsloth.environments.protocol import SingleTurn
from rlsloth.errors import UserError
from rlsloth.evaluation.problems import Shortened, longest_prompt, without_overlong

POLICY: Any = SimpleNamespace(context=128, embeddings=1000)


def environment() -> SingleTurn:
    rows = [{"question": "long " * 50 if i in (2, 5) else f"{i}?"} for i in range(8)]
    prompts = make_prompts(rows, EnvConfig(), "d")
    return SingleTurn("dataset", prompts[:6], prompts[6:], source="d")


def test_overlong_prompts_are_left_out_and_counted() -> None:
    env = environment()
    with pytest.raises(UserError, match=r"prompt 3 has \d+ tokens .*--env\.max-prompt-tokens 64"):
        longest_prompt(renderer(), env.train, POLICY)
    fitting = without_overlong(env, renderer(), 64)
    assert isinstance(fitting, Shortened)
    assert [prompt.index for prompt in fitting.train] == [0, 1, 3, 4]
    assert [prompt.index for prompt in fitting.heldout] == [6, 7]
    assert (fitting.name, fitting.source, fitting.single_turn) == ("dataset", "d", True)
    counted = "2 prompts of more than --env.max-prompt-tokens 64 are left out (prompt 3"
    assert fitting.left_out.startswith(counted)
    assert longest_prompt(renderer(), fitting.train, POLICY) <= 64
    assert without_overlong(fitting, renderer(), 64) is fitting


def test_a_limit_that_leaves_nothing() -> None:
    with pytest.raises(UserError, match=r"max-prompt-tokens 3 leaves no .* shortest has \d+"):
        without_overlong(environment(), renderer(), 3)
