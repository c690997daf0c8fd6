"""The number-guessing game, by itself and trained on with the command."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli
from rlsloth.config import EnvConfig
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment, Reply
from rlsloth.records import Group
from rlsloth.run.run import Run

pytestmark = pytest.mark.slow

NAME = f"{Path(__file__).parents[2]}/examples/own_environment.py:GuessNumber"


def load(seed: int = 0, **params: int) -> Environment:
    return load_environment(EnvConfig(name=NAME, heldout=20, params=params), seed)


def play(env: Environment, guess: str) -> Reply:
    reply = env.start(env.train[0]).step({"role": "assistant", "content": guess})
    assert isinstance(reply, Reply)
    return reply


def test_the_rules() -> None:
    env = load(width=10)
    secret = env.train[0].columns["secret"]
    assert play(env, f"It is {secret}.") == Reply(done=True, reward=1.0)
    low, near, high = (play(env, str(guess)) for guess in (secret - 5, secret - 1, secret + 5))
    assert "higher" in low.messages[0]["content"]
    assert low.reward == pytest.approx(-0.05)
    assert near.reward == pytest.approx(-0.01)
    assert ("lower" in high.messages[0]["content"], high.done) == (True, False)
    assert play(env, str(secret + 1000)).reward == pytest.approx(-0.1)
    assert play(env, "Hm.").reward == -0.2


def test_secrets_lie_in_the_range_and_depend_on_the_seed() -> None:
    env = load(width=3)
    assert (len(env.train), len(env.heldout)) == (480, 20)
    prompts = [*env.train, *env.heldout]
    assert all(0 <= prompt.columns["secret"] - prompt.index < 3 for prompt in prompts)
    assert env.train == load(width=3).train
    assert env.train != load(seed=1, width=3).train


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model whose turns end after a few tokens, about one in eight of them a digit."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer), context=2048)
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    ends = [i for i in range(40, 100) if i not in digits]
    model.generation_config.eos_token_id = [2, *ends]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_trains_on_it(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Group] = []

    log_samples = Run.log_samples

    def watch(self: Run, step: int, groups: Sequence[Group], names: Sequence[str]) -> None:
        seen.extend(groups)
        log_samples(self, step, groups, names)

    monkeypatch.setattr(Run, "log_samples", watch)
    argv = ["grpo", "--env.name", NAME, "--env.params.width", "10", "--env.max-turns", "3"]
    argv += ["--env.heldout", "20", "--model.path", model, "--model.device", "cpu", "--steps", "2"]
    argv += ["--prompts-per-step", "4", "--group-size", "4", "--rollout.max-tokens", "48"]
    argv += ["--eval.problems", "4", "--eval.samples", "2", "--eval.correct-at", "1"]
    argv += ["--reward.workers", "1", "--run.dir", str(tmp_path / "run")]
    assert cli.main(argv) == 0, capfd.readouterr().err

    rollouts = [rollout for group in seen for rollout in group.rollouts]
    assert len(rollouts) == 2 * 4 * 4
    assert any(len(rollout.turn_rewards) > 1 for rollout in rollouts)
    for rollout in rollouts:
        turns = [sampled for sampled, _ in itertools.groupby(rollout.loss_mask) if sampled]
        assert len(rollout.turn_rewards) in (0, len(turns))
        if rollout.turn_rewards:
            assert rollout.reward == pytest.approx(sum(rollout.turn_rewards))
    rows = [row for step in (1, 2) for row in samples(tmp_path / "run", step)]
    for row, rollout in zip(rows, rollouts, strict=True):
        assert row["environment"] == rollout.reward
        first = next(i for i, sampled in enumerate(rollout.loss_mask) if sampled)
        assert row["advantage"] == pytest.approx(rollout.advantages[first])
    for group in seen:
        best = max(group.rollouts, key=lambda r: -9.0 if r.reward is None else r.reward)
        assert max(best.advantages) == max(max(r.advantages) for r in group.rollouts) >= 0
    assert any(row["advantage"] > 0 for row in rows)


def samples(run: Path, step: int) -> list[dict[str, float]]:
    (path,) = (run / "samples").glob(f"*{step}.parquet")
    rows: list[dict[str, float]] = pq.read_table(path).to_pylist()
    return rows
