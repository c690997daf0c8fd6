"""The configuration of ``rlsloth grpo``, ``eval`` and ``plan``."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlsloth.config.loss import AdvantageConfig, LossConfig
from rlsloth.config.training import ProblemsConfig, TrainingConfig


class GrpoConfig(TrainingConfig, ProblemsConfig):
    """Reinforcement learning from reward scripts with group-relative advantages."""

    steps: int = Field(100, ge=1)
    """Rollout-and-update rounds."""
    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(8, ge=2)
    """Completions per prompt; advantages compare them with each other, so at least 2."""
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer updates on each step's rollouts; 1 is exactly on-policy."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _consistent(self) -> GrpoConfig:
        cut = self.rollout.top_p < 1 or self.rollout.top_k or self.rollout.min_p
        if cut and (self.loss.correction != "none" or self.loss.gap_action != "warn"):
            raise ValueError(
                "loss.correction and loss.gap_action compare whole distributions: with either, "
                "leave rollout.top_p, top_k and min_p off"
            )
        if self.rollout.overlap and self.loss.correction == "none":
            raise ValueError(
                "rollout.overlap trains on rollouts that are one update old: pass loss.correction "
                "token_truncate"
            )
        if self.loss.overlong_buffer > self.rollout.max_tokens:
            raise ValueError(
                f"loss.overlong_buffer {self.loss.overlong_buffer} exceeds rollout.max_tokens "
                f"{self.rollout.max_tokens}"
            )
        return self
