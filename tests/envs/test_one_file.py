"""Files to add an environment: one, in the working directory or among the built-in ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlsloth.envs
from helpers.one_step import make_place, take_step

pytestmark = pytest.mark.slow

ENVIRONMENT = '''
"""An environment of eight coins that always pays a half."""

from rlsloth.data.heldout import split_heldout
from rlsloth.environments.protocol import GENERATED, Episode, Reply
from rlsloth.records import Prompt


class Toss(Episode):
    def step(self, message):
        return Reply(done=True)

    def end(self):
        return 0.5


class coins:
    default_rewards = ("environment",)
    single_turn = True
    source = GENERATED

    def __init__(self, cfg, seed):
        self.name = cfg.name
        texts = [f"Toss coin {number}." for number in range(8)]
        prompts = [
            Prompt(number, ({"role": "user", "content": text},), {})
            for number, text in enumerate(texts)
        ]
        self.train, self.heldout = split_heldout(prompts, cfg.heldout, seed)

    def start(self, prompt):
        return Toss()
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, in which built-in environments are looked for, too."""
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path)
    monkeypatch.setattr(rlsloth.envs, "__path__", [*rlsloth.envs.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("rlsloth.envs.coins", None)


@pytest.mark.parametrize("name", ["./coins.py:coins", "coins"])
def test_a_file_of_ones_own_or_in_envs_is_an_environment(name: str, place: Path) -> None:
    (place / "coins.py").write_text(ENVIRONMENT)
    metrics = take_step(f"--env.name {name}")
    assert metrics["reward"] == metrics["rewards/environment/mean"] == 0.5
