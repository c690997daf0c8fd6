"""The sections that loops share: training, and the problems that a policy answers."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from rlsloth.config.data import EnvConfig
from rlsloth.config.evaluation import EvalConfig
from rlsloth.config.model import LoraConfig, ModelConfig
from rlsloth.config.optim import OptimConfig
from rlsloth.config.reward import RewardConfig
from rlsloth.config.rollout import RolloutConfig
from rlsloth.config.run import RunConfig
from rlsloth.config.section import Section

MICROBATCH = 8192
"""Tokens of a micro-batch where neither the user nor a memory plan decides."""


class TrainingConfig(Section):
    """A loop that trains a policy: model, adapter, optimizer, evaluation and run folder."""

    steps: int = Field(default=100, ge=0)
    """Optimizer steps."""
    tokens_per_microbatch: int | None = Field(default=None, ge=1)
    """Token budget of one packed forward; does not change the gradient. Default: the fastest one
    that fits by the memory plan, up to 65536; on a CPU 8192. Never less than the longest example or
    completion needs."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Same seed, same machine: same run."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _adapter_settings(self) -> Any:
        changed = [key for key, value in self.lora if value != getattr(LoraConfig(), key)]
        if changed and not self.model.trains_adapter:
            raise ValueError(
                f"lora.{changed[0]} has no effect with model.trained {' '.join(self.model.trained)}"
                ": leave it out"
            )
        return self

    @property
    def microbatch(self) -> int:
        """``tokens_per_microbatch``, or MICROBATCH where it is not decided."""
        return self.tokens_per_microbatch or MICROBATCH

    def evaluates(self) -> bool:
        """Whether any evaluation is on."""
        return bool(self.eval.at_start or self.eval.every or self.eval.at_end)


class ProblemsConfig(Section):
    """Problems that a policy answers: where they come from, how it samples, what scores it."""

    rewards: list[str] = []
    """Names (math_verify), dotted paths (pkg.module:function) or files (./mine.py:reward)."""
    env: EnvConfig = EnvConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _one_weight_a_reward(self) -> Any:
        weights = self.reward.weights
        if weights is not None and self.rewards and len(weights) != len(self.rewards):
            raise ValueError(
                f"reward.weights has {len(weights)} numbers for {len(self.rewards)} rewards"
            )
        return self
