"""The configuration of ``rlsloth grpo``, ``eval`` and ``plan``."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlsloth.config.loss import AdvantageConfig, LossConfig
from rlsloth.config.training import ProblemsConfig, TrainingConfig


class GrpoConfig(TrainingConfig, ProblemsConfig):
    """Reinforcement learning from rewards, with advantages relative to a group (GRPO)."""

    steps: int = Field(default=100, ge=1)
    """Steps; each samples rollouts and trains on them."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts sampled in each step."""
    group_size: int = Field(default=8, ge=2)
    """Completions of each prompt; at least 2, since advantages compare them with each other."""
    updates_per_rollout: int = Field(default=1, ge=1)
    """Optimizer updates on the rollouts of each step; 1 is exactly on-policy."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _consistent(self) -> GrpoConfig:
        cut = self.rollout.top_p < 1 or self.rollout.top_k or self.rollout.min_p
        if cut and (self.loss.correction != "none" or self.loss.gap_action != "warn"):
            raise ValueError(
                "loss.correction and loss.gap_action compare whole distributions: with either, "
                "leave out rollout.top_p, rollout.top_k and rollout.min_p"
            )
        if self.rollout.overlap and self.loss.correction == "none":
            raise ValueError(
                "rollout.overlap trains on rollouts that are one update old: pass loss.correction "
                "token_truncate"
            )
        if self.rollout.overlap and not self.model.trains_adapter:
            raise ValueError(
                f"rollout.overlap with model.trained {' '.join(self.model.trained)}: rollouts "
                "would be sampled from weights that an update is changing; leave one of them out"
            )
        if self.loss.overlong_buffer > self.rollout.max_tokens:
            raise ValueError(
                f"loss.overlong_buffer {self.loss.overlong_buffer} exceeds rollout.max_tokens "
                f"{self.rollout.max_tokens}"
            )
        return self
