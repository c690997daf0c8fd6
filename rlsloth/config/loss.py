"""The advantage and loss sections of `rlsloth grpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsloth.config.section import Section, Text


class AdvantageConfig(Section):
    """From rewards to advantages."""

    normalize: Literal["group", "batch", "none", "leave_one_out"] = "group"
    """group: (r - mean) / std of the group (GRPO). batch: group mean, std of the step. none: r -
    mean (Dr. GRPO). leave_one_out: r - mean of the others (RLOO)."""


class LossConfig(Section):
    """The policy loss."""

    name: Text = "dapo"
    """A built-in loss, or your own: pkg.module:name or ./file.py:name (examples/own_loss.py)."""
    ratio: Literal["token", "sequence"] | None = None
    """Importance ratio per token or per sequence; default is the loss's own (sequence for gspo)."""
    epsilon_low: float = Field(default=0.2, ge=0)
    """Lower clip: a ratio below 1 - epsilon_low gives no gradient where the advantage is
    negative."""
    epsilon_high: float | None = Field(default=None, ge=0)
    """Upper clip; default epsilon_low. Higher (0.28) is DAPO's clip-higher. cispo: the cap of the
    ratio itself, default 5. gspo's sequence ratios move little: try 3e-4 and 4e-4."""
    delta: float | None = Field(default=None, gt=0)
    """Two-sided clipping: cap of the unclipped ratio, which bounds the loss where advantages are
    negative."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term to the starting policy; 0 skips the reference pass."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator (Schulman 2020)."""
    kl_ratio_weighted: bool = True
    """Multiply the KL estimate by the importance ratio, which makes its gradient unbiased."""
    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    """Weight tokens by exp(trainer - rollout log-prob), per token or per sequence, truncated or
    masked."""
    correction_max: float = Field(default=3.0, gt=0)
    """Upper bound of the correction's weight: truncated there, or masked above it."""
    correction_min: float | None = Field(default=None, ge=0)
    """Lower bound; default none."""
    gap_limit: float = Field(default=0.05, gt=0)
    """Mean |trainer - rollout log-prob| in nats per token above which gap_action is taken. 16 bits
    scatter by about 0.03 on the smallest models."""
    gap_action: Literal["warn", "correct", "stop"] = "warn"
    """correct: correction token_truncate from the next step to the end of the run. stop: end the
    run; its checkpoints stay."""
    mask_truncated: bool = False
    """Leave completions cut off by the length limit out of the loss (DAPO's overlong filtering)."""
    overlong_buffer: int = Field(default=0, ge=0)
    """DAPO's soft overlong punishment: over this many last tokens a penalty falls linearly to -1.
    It is added to the reward for the advantage alone, and logged as overlong_penalty; 0 is off."""

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        low, high = self.correction_min, self.correction_max
        if low is not None and low > high:
            raise ValueError(f"correction_min {low} exceeds correction_max {high}")
        if self.gap_action == "correct" and self.correction != "none":
            raise ValueError(
                f"gap_action correct puts a correction on, but {self.correction} is on from the "
                "start: leave out one of them"
            )
        upper = 1 + (self.epsilon_low if self.epsilon_high is None else self.epsilon_high)
        if self.delta is not None and self.delta <= upper:
            raise ValueError(f"delta {self.delta} must exceed 1 + epsilon_high = {upper:g}")
        return self
