"""Files to add a reward: one, in the working directory or among the built-in ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.one_step import QUESTIONS, make_place, take_step
from helpers.source import ROOT

pytestmark = pytest.mark.slow

REWARD = '''
"""The length of the answer."""

from rlsloth.scoring.example import Example


def digits(completions, answer, **columns):
    """Number of digits of the answer."""
    return [len(gold) for gold in answer]


EXAMPLES = (
    Example("7", 1, "one digit", columns={"answer": "7"}),
    Example("7", 2, "two digits", columns={"answer": "17"}),
)
'''


def test_a_file_of_ones_own_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path)
    Path("digits.py").write_text(REWARD)
    metrics = take_step(f"{QUESTIONS} --rewards ./digits.py:digits")
    assert metrics["reward"] == metrics["rewards/digits/mean"] == 1


def linked_package(folder: Path) -> Path:
    """Build the package from links to its parts, and return its folder of rewards."""
    package = folder / "rlsloth"
    rewards = package / "rewards"
    rewards.mkdir(parents=True)
    for source, target in ((ROOT / "rlsloth", package), (ROOT / "rewards", rewards)):
        for path in source.iterdir():
            if path.name not in ("rewards", "__pycache__"):
                (target / path.name).symlink_to(path)
    return rewards


def test_the_same_file_in_rewards_is_a_built_in_one(tmp_path: Path) -> None:
    """The command runs from the package with one file more."""
    (linked_package(tmp_path) / "digits.py").write_text(REWARD)

    def rewards(*arguments: str) -> str:
        command = [sys.executable, "-m", "rlsloth", "rewards", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    assert "Number of digits of the answer" in rewards("list")
    assert "2 of 2 examples as expected" in rewards("test", "digits")
