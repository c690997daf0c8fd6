"""What a configuration asks of a rollout engine: how many sequences at once, and how long."""

from __future__ import annotations

from rlsloth.config import GrpoConfig
from rlsloth.memory.shape import ModelShape

SINGLE_TURN = ("dataset", "reasoning_gym")
"""Built-in environments in which one completion ends the rollout."""


def asked_sequences(cfg: GrpoConfig) -> int:
    """Completions wanted at once by a step or an evaluation, whichever wants more."""
    evaluates = cfg.eval.at_start or cfg.eval.every or cfg.eval.at_end
    evaluation = cfg.eval.problems * cfg.eval.samples if evaluates else 0
    return max(cfg.prompts_per_step * cfg.group_size, evaluation)


def sequences_at_once(cfg: GrpoConfig) -> int:
    """Of these so many are decoded at once."""
    return min(cfg.rollout.max_sequences, asked_sequences(cfg))


def context_limit(shape: ModelShape, cfg: GrpoConfig) -> int:
    """Tokens of prompt and completion that the model is used with."""
    return min(cfg.model.max_context or shape.context, shape.context)


def one_turn(shape: ModelShape, cfg: GrpoConfig, longest_prompt: int) -> int:
    """Tokens of the longest prompt with the longest completion."""
    tokens = max(cfg.rollout.max_tokens, cfg.eval.max_tokens or 0)
    return min(longest_prompt + tokens, context_limit(shape, cfg))


def longest_sequence(shape: ModelShape, cfg: GrpoConfig, longest_prompt: int) -> int:
    """The same with what tools may answer in between: up to the model's limit."""
    if cfg.env.name.partition(":")[0] in SINGLE_TURN:
        return one_turn(shape, cfg, longest_prompt)
    return context_limit(shape, cfg)
