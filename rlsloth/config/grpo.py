"""``rlsloth grpo``, ``eval`` and ``plan``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsloth.config.parts import (
    EnvConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from rlsloth.config.section import Section


class AdvantageConfig(Section):
    """From rewards to advantages."""

    normalize: Literal["group", "batch", "none", "leave_one_out"] = "group"
    """group: (r - mean) / std of the group (GRPO). batch: group mean, std of the step. none: r -
    mean (Dr. GRPO). leave_one_out: r - mean of the others (RLOO)."""


class LossConfig(Section):
    """The policy loss."""

    name: Literal["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo"] = "dapo"
    ratio: Literal["token", "sequence"] | None = None
    """Importance ratio per token or per sequence; default is the loss's own (sequence for gspo)."""
    epsilon_low: float = Field(0.2, ge=0)
    epsilon_high: float | None = Field(None, ge=0)
    """Upper clip; default epsilon_low. Higher (0.28) is DAPO's clip-higher. cispo: the cap of the
    ratio itself, default 5. gspo's sequence ratios move little: try 3e-4 and 4e-4."""
    delta: float | None = Field(None, gt=0)
    """Two-sided clipping: cap of the unclipped ratio, which bounds the loss where advantages are
    negative."""
    beta: float = Field(0.0, ge=0)
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
    correction_max: float = Field(3.0, gt=0)
    correction_min: float | None = Field(None, ge=0)
    """Lower bound; default none."""
    gap_limit: float = Field(0.05, gt=0)
    """Mean |trainer - rollout log-prob| in nats per token above which gap_action is taken. 16 bits
    scatter by about 0.03 on the smallest models."""
    gap_action: Literal["warn", "correct", "stop"] = "warn"
    """correct: correction token_truncate from the next step to the end of the run. stop: end the
    run; its checkpoints stay."""
    mask_truncated: bool = False
    """Leave completions cut off by the length limit out of the loss (DAPO's overlong filtering)."""
    overlong_buffer: int = Field(0, ge=0)
    """DAPO's soft overlong punishment: over this many last tokens the reward falls linearly to -1;
    0 is off."""

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
        if self.delta is not None and self.name == "cispo":
            raise ValueError("delta has no effect with cispo; epsilon_high caps its ratio")
        upper = 1 + (self.epsilon_low if self.epsilon_high is None else self.epsilon_high)
        if self.delta is not None and self.delta <= upper:
            raise ValueError(f"delta {self.delta} must exceed 1 + epsilon_high = {upper:g}")
        return self


MICROBATCH = 8192
"""Tokens of a micro-batch where neither the user nor a plan has a say."""


class GrpoConfig(Section):
    """Reinforcement learning from reward scripts with group-relative advantages."""

    steps: int = Field(100, ge=1)
    """Rollout-and-update rounds."""
    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(8, ge=2)
    """Completions per prompt; advantages compare them with each other, so at least 2."""
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer updates on each step's rollouts; 1 is exactly on-policy."""
    tokens_per_microbatch: int | None = Field(None, ge=1)
    """Token budget of one packed forward; does not change the gradient. Default: the most, up to
    16384, with which a tenth of the GPU stays free by plan; on a CPU 8192. Never less than one
    completion needs."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Same seed, same machine: same run."""
    rewards: list[str] = []
    """Names (math_verify), dotted paths (pkg.module:function) or files (./mine.py:reward)."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    env: EnvConfig = EnvConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> GrpoConfig:
        weights = self.reward.weights
        if weights is not None and len(weights) != len(self.rewards):
            raise ValueError(
                f"reward.weights has {len(weights)} numbers for {len(self.rewards)} rewards"
            )
        cut = self.rollout.top_p < 1 or self.rollout.top_k or self.rollout.min_p
        if cut and (self.loss.correction != "none" or self.loss.gap_action != "warn"):
            raise ValueError(
                "loss.correction and loss.gap_action compare whole distributions: with either, "
                "leave rollout.top_p, top_k and min_p off"
            )
        if self.rollout.overlap and self.rollout.engine == "transformers":
            raise ValueError("rollout.overlap needs rollout.engine vllm")
        if self.rollout.kv_cache != "auto" and self.rollout.engine == "transformers":
            raise ValueError(f"rollout.kv_cache {self.rollout.kv_cache} needs rollout.engine vllm")
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

    @property
    def microbatch(self) -> int:
        """``tokens_per_microbatch``, or MICROBATCH until something else is decided."""
        return self.tokens_per_microbatch or MICROBATCH


class PlanConfig(GrpoConfig):
    """A training run's configuration, and what its memory plan is made for."""

    memory_gb: float | None = Field(None, gt=0, le=65536)
    """GPU memory in GiB; default: that of this machine's GPU."""
    longest_prompt: int | None = Field(None, ge=1)
    """Tokens of the longest prompt; default: from local or generated data, else 512."""
