"""Configuration: pydantic models, the only home of defaults. cli_config reads files and flags."""

from rlsloth.config.grpo import MICROBATCH, AdvantageConfig, GrpoConfig, LossConfig, PlanConfig
from rlsloth.config.parts import (
    DatasetConfig,
    EnvConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from rlsloth.config.section import Params, Section

__all__ = [
    "MICROBATCH",
    "AdvantageConfig",
    "DatasetConfig",
    "EnvConfig",
    "EvalConfig",
    "GrpoConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "Params",
    "PlanConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
]
