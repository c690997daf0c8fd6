"""Configuration: pydantic models with all options and their defaults."""

from rlsloth.config.data import DatasetConfig, EnvConfig
from rlsloth.config.evaluation import EvalConfig
from rlsloth.config.grpo import GrpoConfig
from rlsloth.config.loss import AdvantageConfig, LossConfig
from rlsloth.config.model import LoraConfig, ModelConfig
from rlsloth.config.optim import OptimConfig
from rlsloth.config.reward import RewardConfig
from rlsloth.config.rollout import RolloutConfig
from rlsloth.config.run import RunConfig
from rlsloth.config.section import Params, Section
from rlsloth.config.training import MICROBATCH, ProblemsConfig, TrainingConfig

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
    "ProblemsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "TrainingConfig",
]
