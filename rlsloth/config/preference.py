"""Settings that all preference methods share. Each method adds its own in
``rlsloth.losses.preference.methods``.
"""

from __future__ import annotations

from pydantic import model_validator

from rlsloth.config.data import ExamplesConfig, PreferenceDataConfig
from rlsloth.config.optim import OptimConfig, PreferenceOptimConfig
from rlsloth.config.section import Section
from rlsloth.config.sft import SupervisedConfig


class PreferenceConfig(SupervisedConfig):
    """Settings that the preference methods share."""

    data: ExamplesConfig = PreferenceDataConfig()
    optim: OptimConfig = PreferenceOptimConfig()
    loss: Section = Section()
    """Options of the method's own loss."""

    @model_validator(mode="after")
    def _no_dropout(self) -> PreferenceConfig:
        if self.lora.dropout:
            raise ValueError(
                "lora.dropout is noise in every log-ratio: leave it at 0 (TRL switches it off, too)"
            )
        return self
