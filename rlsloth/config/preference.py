"""Options of all preference methods; ``losses/preference/methods.py`` has those of each method."""

from __future__ import annotations

from pydantic import model_validator

from rlsloth.config.data import ExamplesConfig, PreferenceDataConfig
from rlsloth.config.optim import OptimConfig, PreferenceOptimConfig
from rlsloth.config.section import Section
from rlsloth.config.sft import SupervisedConfig


class PreferenceConfig(SupervisedConfig):
    """Options that all preference methods share."""

    data: ExamplesConfig = PreferenceDataConfig()
    optim: OptimConfig = PreferenceOptimConfig()
    loss: Section = Section()
    """Options of the method's loss."""

    @model_validator(mode="after")
    def _no_dropout(self) -> PreferenceConfig:
        if self.lora.dropout:
            raise ValueError(
                "lora.dropout adds noise to every log-ratio: leave it at 0 (TRL does so, too)"
            )
        return self
