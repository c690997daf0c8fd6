"""A number-guessing game: an environment that replies to each turn and rewards it.

    rlsloth grpo --env.name ./examples/own_environment.py:GuessNumber --model.path FOLDER_OR_GGUF

From Python: ``rlsloth.grpo(config, environment=GuessNumber)``.

A hit earns 1 and a miss costs up to 0.1, more the further it is off; the sum over all turns is the
rollout's reward. ``--env.max-turns`` limits the guesses; ``--env.params.width`` is the number of
candidates.
"""

from __future__ import annotations

import random
import re

from rlsloth import EnvConfig, Episode, Message, Prompt, Reply
from rlsloth.data.heldout import split_heldout
from rlsloth.environments.protocol import GENERATED

GAMES = 500
"""Games to draw; ``--env.heldout`` of them are kept from training."""


class Game(Episode):
    """One game, which ends with the hit."""

    def __init__(self, secret: int, width: int) -> None:
        self.secret = secret
        self.width = width

    def step(self, message: Message) -> Reply:
        """Reward the guess in an assistant turn, and reply with a hint."""
        number = re.search(r"\d+", message["content"])
        if number is None:
            return Reply([user("Answer with a number.")], reward=-0.2)
        guess = int(number[0])
        if guess == self.secret:
            return Reply(done=True, reward=1.0)
        distance = min(1.0, abs(guess - self.secret) / self.width)
        hint = "higher" if guess < self.secret else "lower"
        return Reply([user(f"It is {hint}.")], reward=-0.1 * distance)


class GuessNumber:
    """Games with secrets that depend on the seed; the class is called with (cfg, seed)."""

    default_rewards = ("environment",)
    single_turn = False
    source = GENERATED

    def __init__(self, cfg: EnvConfig, seed: int) -> None:
        self.name = cfg.name
        self.width = int(cfg.params.get("width", 10))
        rng = random.Random(seed)
        prompts = [self.prompt(low, rng.randrange(self.width)) for low in range(GAMES)]
        self.train, self.heldout = split_heldout(prompts, cfg.heldout, seed)

    def prompt(self, low: int, offset: int) -> Prompt:
        """Ask for a number of ``width`` ones from ``low`` on; the secret is in a column."""
        text = f"Guess my number: it is between {low} and {low + self.width - 1}."
        return Prompt(low, (user(text),), {"secret": low + offset})

    def start(self, prompt: Prompt) -> Game:
        """Begin the game of one rollout."""
        return Game(prompt.columns["secret"], self.width)


def user(text: str) -> Message:
    """A message to the model."""
    return {"role": "user", "content": text}
