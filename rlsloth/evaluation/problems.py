"""The problems of a run: an environment, and the rewards that score completions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rlsloth.config import EvalConfig, ProblemsConfig, RewardConfig
from rlsloth.data.reading import NAMED
from rlsloth.data.renderer import Renderer, refuse_beyond
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment, Episode
from rlsloth.errors import UserError, nearest
from rlsloth.policy.policy import Policy
from rlsloth.records import Prompt
from rlsloth.run.metrics import TRAINER_METRICS
from rlsloth.run.run import Run
from rlsloth.scoring.scorer import Scorer

FORMAT = "format_tags"
"""Built-in reward that reads the opening tag."""


@dataclass(frozen=True, slots=True)
class Problems:
    """An environment, and the scorer of completions."""

    env: Environment
    scorer: Scorer
    deciding: int
    """Position of the reward that decides whether a completion is correct."""


def open_problems(
    cfg: ProblemsConfig, seed: int, deciding: str | None, stack: ExitStack
) -> Problems:
    """Load the environment, start the reward processes and check them on its prompts.

    Args:
        deciding: name of the reward that decides what is correct; default: the first.
        stack: closes the reward processes.

    Raises:
        UserError: no such environment or reward, no reward at all, or a reward that fails.
    """
    env = load_environment(cfg.env, seed)
    rewards = cfg.rewards or list(env.default_rewards)
    if not rewards:
        raise UserError(
            f"--rewards is empty, and environment {env.name} has no default; pass --rewards NAME "
            "(`rlsloth rewards list` shows the built-in ones)"
        )
    scorer = stack.enter_context(Scorer(rewards, cfg.reward, reserved_metrics=TRAINER_METRICS))
    position = reward_position(deciding, scorer.names)
    scorer.wait_ready()
    scorer.check([*env.train, *env.heldout])
    return Problems(env, scorer, position)


def reward_position(name: str | None, names: Sequence[str]) -> int:
    """Position of a reward among ``names``; without a name the first. Raises UserError."""
    if name is None:
        return 0
    if name not in names:
        raise UserError(
            f"--eval.reward {name!r} is not among --rewards {' '.join(names)}{nearest(name, names)}"
            "; pass one of them, or add it to --rewards"
        )
    return list(names).index(name)


def heldout_problems(env: Environment, cfg: EvalConfig) -> Sequence[Prompt]:
    """Prompts to evaluate on. Raises UserError if there are none."""
    problems = env.heldout[: cfg.problems]
    if not problems:
        raise UserError(
            "no held-out problems to evaluate on: pass --env.validation FILE, raise "
            "--env.heldout, or switch evaluation off: --eval.at-start false --eval.at-end false "
            "--eval.every 0"
        )
    return problems


@dataclass(frozen=True, slots=True)
class Shortened:
    """An environment without its overlong prompts."""

    inner: Environment
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    left_out: str
    """Line that counts the prompts left out, and names the first ones."""

    @property
    def name(self) -> str:
        """The name as configured."""
        return self.inner.name

    @property
    def default_rewards(self) -> tuple[str, ...]:
        """Rewards of the environment itself."""
        return self.inner.default_rewards

    @property
    def single_turn(self) -> bool:
        """Whether every rollout ends with its first completion."""
        return self.inner.single_turn

    @property
    def source(self) -> str:
        """The dataset that the prompts come from."""
        return self.inner.source

    def start(self, prompt: Prompt) -> Episode:
        """Begin the episode of one rollout of a prompt."""
        return self.inner.start(prompt)


def without_overlong(env: Environment, renderer: Renderer, limit: int) -> Environment:
    """Leave out prompts of more than ``limit`` tokens (``env.max_prompt_tokens``).

    Raises:
        UserError: no training prompt is left.
    """
    lengths = {
        kind: [len(renderer.prompt_ids(prompt)) for prompt in prompts]
        for kind, prompts in (("train", env.train), ("heldout", env.heldout))
    }
    kept = {
        kind: [p for p, n in zip(prompts, lengths[kind], strict=True) if n <= limit]
        for kind, prompts in (("train", env.train), ("heldout", env.heldout))
    }
    long = [
        f"prompt {prompt.index + 1} has {length}"
        for kind, prompts in (("train", env.train), ("heldout", env.heldout))
        for prompt, length in zip(prompts, lengths[kind], strict=True)
        if length > limit
    ]
    if not long:
        return env
    if not kept["train"]:
        raise UserError(
            f"--env.max-prompt-tokens {limit} leaves no training prompt: the shortest has "
            f"{min(lengths['train'], default=0)} tokens; raise it"
        )
    first = ", ".join(long[:NAMED])
    more = ", ..." if len(long) > NAMED else ""
    text = (
        f"{len(long)} prompts of more than --env.max-prompt-tokens {limit} are left out "
        f"({first}{more})"
    )
    return Shortened(env, kept["train"], kept["heldout"], text)


def warn_of_open_tag(run: Run, renderer: Renderer, problems: Problems, cfg: RewardConfig) -> None:
    """Name a tag that the chat template opens, which is then missing in completions."""
    tag = renderer.opened_tag(problems.env.train[0])
    if tag is None:
        return
    run.say(f"the prompt ends with <{tag}>: completions begin inside it, without the opening tag")
    on = cfg.params.get(FORMAT, {}).get("first_tag_open")
    if FORMAT in problems.scorer.names and not on:
        run.warn(
            f"{FORMAT} expects <{tag}> in the completion and will score 0: pass "
            f"--reward.params.{FORMAT} first_tag_open true"
        )


def longest_prompt(renderer: Renderer, prompts: Sequence[Prompt], policy: Policy) -> int:
    """Count the tokens of the longest prompt.

    Raises:
        UserError: a prompt fills the context, or has a token without an embedding.
    """
    longest, context = 0, policy.context
    for prompt in prompts:
        ids = renderer.prompt_ids(prompt)
        refuse_beyond(ids, renderer.tokenizer, policy.embeddings, f"prompt {prompt.index + 1}")
        length = len(ids)
        if length >= context:
            raise UserError(
                f"prompt {prompt.index + 1} has {length} tokens and fills the model's context of "
                f"{context}; leave such prompts out with --env.max-prompt-tokens {context // 2}, "
                "or raise --model.max-context if the model's own limit is higher"
            )
        longest = max(longest, length)
    return longest
