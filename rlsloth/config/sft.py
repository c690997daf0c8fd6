"""The configuration of ``rlsloth sft``, and the options it shares with preference methods."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlsloth.config.data import ExamplesConfig, SftDataConfig
from rlsloth.config.evaluation import SupervisedEvalConfig
from rlsloth.config.optim import SftOptimConfig
from rlsloth.config.training import ProblemsConfig, TrainingConfig


class SupervisedConfig(TrainingConfig, ProblemsConfig):
    """Options that SFT and preference methods share."""

    steps: int = Field(default=0, ge=0)
    """Optimizer updates; 0: as many as epochs take."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data, in place of steps. Default: 1 if steps is not set either."""
    samples_per_step: int = Field(default=16, ge=1)
    """Examples of each optimizer update."""
    data: ExamplesConfig = ExamplesConfig()
    eval: SupervisedEvalConfig = SupervisedEvalConfig()

    @model_validator(mode="after")
    def _generates(self) -> SupervisedConfig:
        if self.steps and self.epochs is not None:
            raise ValueError(
                f"steps {self.steps} and epochs {self.epochs:g} are both set: leave out one "
                "(--steps 0 or --epochs none overrides a file)"
            )
        if not self.eval.generate:
            for name in ("rewards", "env", "rollout", "reward"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect without eval.generate true")
        if self.rollout.overlap:
            raise ValueError(
                "rollout.overlap is for rlsloth grpo: there are no rollouts to train on here"
            )
        return self


class SftConfig(SupervisedConfig):
    """Supervised fine-tuning: raise the likelihood of the completions in a dataset."""

    data: SftDataConfig = SftDataConfig()
    optim: SftOptimConfig = SftOptimConfig()
