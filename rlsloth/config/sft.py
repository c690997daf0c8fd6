"""The configuration of ``rlsloth sft``, and what it shares with the preference methods."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlsloth.config.data import ExamplesConfig, SftDataConfig
from rlsloth.config.evaluation import SupervisedEvalConfig
from rlsloth.config.optim import SftOptimConfig
from rlsloth.config.training import ProblemsConfig, TrainingConfig


class SupervisedConfig(TrainingConfig, ProblemsConfig):
    """Settings that SFT and preference methods share."""

    steps: int = Field(0, ge=0)
    """Optimizer updates; 0: as many as epochs need."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data, in place of steps; 1 where neither is set."""
    samples_per_step: int = Field(16, ge=1)
    """Examples an update is made from."""
    data: ExamplesConfig = ExamplesConfig()
    eval: SupervisedEvalConfig = SupervisedEvalConfig()

    @model_validator(mode="after")
    def _generates(self) -> SupervisedConfig:
        if self.steps and self.epochs is not None:
            raise ValueError(
                "steps and epochs both say how long to train: leave out one of them (steps 0 takes "
                "a file's away)"
            )
        if not self.eval.generate:
            for name in ("rewards", "env", "rollout", "reward"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect without eval.generate")
        if self.rollout.overlap:
            raise ValueError(
                "rollout.overlap is for rlsloth grpo: there are no rollouts to train on here"
            )
        return self


class SftConfig(SupervisedConfig):
    """Supervised fine-tuning: raise the likelihood of the answers in a dataset."""

    data: SftDataConfig = SftDataConfig()
    optim: SftOptimConfig = SftOptimConfig()
