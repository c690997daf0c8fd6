"""Lines of a run about its prompts, and the filter of overlong ones."""

from __future__ import annotations

from dataclasses import replace

from rlsloth.config import EnvConfig, ModelConfig
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer
from rlsloth.environments.protocol import Environment
from rlsloth.evaluation.problems import Problems, without_overlong
from rlsloth.policy.tokenizer import load_tokenizer
from rlsloth.run.run import Run


def fitting_environment(
    model: ModelConfig, cfg: EnvConfig, env: Environment
) -> tuple[Environment, str | None]:
    """Leave out prompts longer than ``env.max_prompt_tokens``.

    Returns:
        The environment, and a line about the prompts left out.

    Raises:
        UserError: no training prompt is left.
    """
    if cfg.max_prompt_tokens is None:
        return env, None
    return without_overlong(env, Renderer(load_tokenizer(model), cfg), cfg.max_prompt_tokens)


def fitting_problems(
    model: ModelConfig, cfg: EnvConfig, problems: Problems
) -> tuple[Problems, str | None]:
    """Leave out problems with overlong prompts, as ``fitting_environment`` does."""
    env, text = fitting_environment(model, cfg, problems.env)
    return replace(problems, env=env), text


def say_of_prompts(run: Run, problems: Problems, overlong: str | None) -> None:
    """Print which columns prompts are made of, which no reward takes, and what is left out."""
    env = getattr(problems.env, "inner", problems.env)
    reading = getattr(env, "reading", None)
    if overlong is not None:
        run.warn(overlong)
    if not isinstance(reading, Reading):
        return
    if problems.env.single_turn and problems.env.train:
        reading.leave(c for c in problems.env.train[0].columns if not problems.scorer.takes(c))
    for line in reading.notes():
        run.say(line)
    for line in reading.warnings():
        run.warn(line)
