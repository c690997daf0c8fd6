"""Lines of a run about its prompts, and the filter of overlong ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlsloth.config import EnvConfig, ModelConfig
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer
from rlsloth.environments.protocol import Environment
from rlsloth.evaluation.problems import Problems, Shortened, without_overlong
from rlsloth.policy.policy import Policy
from rlsloth.policy.tokenizer import load_tokenizer
from rlsloth.run.run import Run


def fitting_environment(model: ModelConfig, cfg: EnvConfig, env: Environment) -> Environment:
    """Leave out prompts longer than ``env.max_prompt_tokens``.

    Raises:
        UserError: no training prompt is left.
    """
    if cfg.max_prompt_tokens is None:
        return env
    return without_overlong(env, Renderer(load_tokenizer(model), cfg), cfg.max_prompt_tokens)


def fitting_problems(model: ModelConfig, cfg: EnvConfig, problems: Problems) -> Problems:
    """Leave out problems with overlong prompts, as ``fitting_environment`` does."""
    return replace(problems, env=fitting_environment(model, cfg, problems.env))


def say_of_prompts(run: Run, problems: Problems) -> None:
    """Print which columns prompts are made of, which no reward takes, and what is left out."""
    env = problems.env
    if isinstance(env, Shortened):
        run.warn(env.left_out)
        env = env.inner
    reading = getattr(env, "reading", None)
    if not isinstance(reading, Reading):
        return
    if problems.env.single_turn and problems.env.train:
        reading.leave(c for c in problems.env.train[0].columns if not problems.scorer.takes(c))
    for line in reading.notes():
        run.say(line)
    for line in reading.warnings():
        run.warn(line)


def describe_sampling(run: Run, problems: Problems, policy: Policy) -> None:
    """Say in one line what is about to be sampled, and on what."""
    env = problems.env
    run.say(
        f"{len(env.train)} training prompts, {len(env.heldout)} held out; rewards: "
        f"{', '.join(problems.scorer.names)}; {policy.device}, attention {policy.backend}"
    )


def describe_evaluated(model: ModelConfig, whole: Path | None = None) -> str:
    """Say in one line what an evaluation measures.

    Args:
        model: the model's configuration.
        whole: folder of the model that a run trained, if it trained the model's own weights.
    """
    if whole is not None:
        return f"evaluation of {model.path}: base model, and trained model {whole}"
    if model.adapter is None:
        return f"evaluation of {model.path}: base model, no adapter"
    return f"evaluation of {model.path}: base model, and adapter {model.adapter}"
