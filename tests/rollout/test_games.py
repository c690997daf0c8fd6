"""Environments that answer with user messages, and rewards a turn."""

from __future__ import annotations

import asyncio

import pytest

from helpers.scripted import END, ScriptedEngine, parts, run
from helpers.tiny import tiny_tokenizer
from rlsloth.config import EnvConfig, RewardConfig
from rlsloth.data.renderer import Renderer
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Episode, Reply, SingleTurn
from rlsloth.records import Group, Message, Prompt
from rlsloth.scoring.scorer import Scorer


class Guess(Episode):
    """The secret is 5; each wrong guess earns 0.1, the hit 1."""

    def answer(self, message: Message) -> Reply:
        guess = int(message["content"])
        if guess == 5:
            return Reply(done=True, reward=1.0)
        hint = "higher" if guess < 5 else "lower"
        return Reply([{"role": "user", "content": hint}], reward=0.1)

    def step(self, message: Message) -> Reply:
        return self.answer(message)


class LateGuess(Guess):
    async def step(self, message: Message) -> Reply:  # type: ignore[override]
        await asyncio.sleep(0)
        return self.answer(message)


class Game(SingleTurn):
    episode: type[Guess] = Guess

    def start(self, prompt: Prompt) -> Episode:
        return self.episode()


class LateGame(Game):
    episode = LateGuess


def make(cfg: EnvConfig, seed: int) -> Game:
    prompt = Prompt(0, ({"role": "user", "content": "guess"},), {})
    return Game(cfg.name, [prompt], [], ("environment",), single_turn=False)


def play(kind: type[Game], max_turns: int = 5) -> Group:
    env = kind("game", make(EnvConfig(name="game"), 0).train, [], single_turn=False)
    renderer = Renderer(tiny_tokenizer(), EnvConfig(name="game"))
    turns = [["3" + END, "5" + END], ["9" + END], ["5" + END]]
    (group,) = run(ScriptedEngine(turns[:max_turns]), env, renderer, n=2, max_turns=max_turns)
    return group


@pytest.mark.parametrize("kind", [Game, LateGame])
def test_a_game_is_played_to_its_end(kind: type[Game]) -> None:
    first, second = play(kind).rollouts
    assert first.turn_rewards == [0.1, 0.1, 1.0]
    assert second.turn_rewards == [1.0]
    assert first.environment_reward == pytest.approx(1.2)
    hint = "\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
    assert parts(first) == [
        (True, "3" + END),
        (False, hint % "higher"),
        (True, "9" + END),
        (False, hint % "lower"),
        (True, "5" + END),
    ]
    assert (first.finish, second.finish) == ("stop", "stop")


def test_the_last_turn_earns_its_reward_too() -> None:
    first, _ = play(Game, max_turns=2).rollouts
    assert (first.finish, first.turn_rewards) == ("length", [0.1, 0.1])


def test_the_reward_environment_is_what_was_earned() -> None:
    group = play(Game)
    with Scorer(["environment"], RewardConfig(workers=1)) as scorer:
        scorer.score([group])
    assert [r.reward for r in group.rollouts] == pytest.approx([1.2, 1.0])


def test_an_environment_of_ones_own_is_one_file() -> None:
    env = load_environment(EnvConfig(name=f"{__file__}:make"), 0)
    assert (env.single_turn, env.source) == (False, "generated")
