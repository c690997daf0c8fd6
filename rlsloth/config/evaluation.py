"""The section ``eval``: evaluation on held-out data."""

from __future__ import annotations

from pydantic import Field

from rlsloth.config.section import Section


class EvalConfig(Section):
    """Evaluation on held-out problems."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations during training; 0: none."""
    at_start: bool = True
    """Evaluate before training."""
    at_end: bool = True
    """Evaluate after training."""
    problems: int = Field(default=100, ge=1)
    """Held-out problems to evaluate on, the first ones."""
    samples: int = Field(default=8, ge=1)
    """Completions of each problem: the k of avg@k, pass@k and maj@k."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of evaluations; 0 takes the most likely token, and one sample of each
    problem, since more would be copies."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest completion in tokens; default: rollout.max_tokens."""
    reward: str | None = None
    """Reward that decides whether a completion is correct; default: the first of rewards."""
    correct_at: float = 1.0
    """Lowest deciding reward of a correct completion. A completion that was cut off is never
    correct."""


class SupervisedEvalConfig(EvalConfig):
    """Evaluation: the loss on held-out examples, and accuracy on held-out problems."""

    generate: bool = False
    """Also sample completions of the held-out problems of env and score them by rewards, as
    `rlsloth grpo` does."""
