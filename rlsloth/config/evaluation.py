"""The evaluation section of each loop."""

from __future__ import annotations

from pydantic import Field

from rlsloth.config.section import Section


class EvalConfig(Section):
    """Evaluation on held-out prompts."""

    every: int = Field(0, ge=0)
    """Also evaluate every this many steps; 0: only before and after training."""
    at_start: bool = True
    at_end: bool = True
    problems: int = Field(100, ge=1)
    samples: int = Field(8, ge=1)
    """Completions per problem: the k of avg@k, pass@k, maj@k."""
    temperature: float = Field(1.0, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    """Default: rollout.max_tokens."""
    reward: str | None = None
    """Which of the rewards decides whether an answer is correct; default: the first."""
    correct_at: float = 1.0
    """A finished completion whose reward reaches this is correct; a cut-off one never is."""


class SupervisedEvalConfig(EvalConfig):
    """Evaluation: the loss of held-out examples, and answers to held-out problems."""

    generate: bool = False
    """Also answer the held-out problems of env, scored by rewards, as `rlsloth grpo` does."""
