"""The configurations of ``rlsloth dpo``, ``orpo``, ``simpo`` and ``kto``."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlsloth.config.data import ExamplesConfig, KtoDataConfig, PreferenceDataConfig
from rlsloth.config.optim import OptimConfig, PreferenceOptimConfig
from rlsloth.config.preference_losses import (
    DpoLossConfig,
    KtoLossConfig,
    OrpoLossConfig,
    SimpoLossConfig,
)
from rlsloth.config.sft import SupervisedConfig


class PreferenceConfig(SupervisedConfig):
    """Settings that the preference methods share."""

    data: ExamplesConfig = PreferenceDataConfig()
    optim: OptimConfig = PreferenceOptimConfig()

    @model_validator(mode="after")
    def _no_dropout(self) -> PreferenceConfig:
        if self.lora.dropout:
            raise ValueError(
                "lora.dropout is noise in every log-ratio: leave it at 0 (TRL switches it off, too)"
            )
        return self


class DpoConfig(PreferenceConfig):
    """Direct preference optimization: pairs against the starting policy."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: DpoLossConfig = DpoLossConfig()
    precompute_reference: bool = False
    """Score all examples under the starting policy once, before the first step: saves a forward a
    step from the second epoch on."""


class OrpoConfig(PreferenceConfig):
    """Odds-ratio preference optimization: likelihood and preference at once, no reference."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: OrpoLossConfig = OrpoLossConfig()


class SimpoConfig(PreferenceConfig):
    """Simple preference optimization: mean log-probs with a margin, no reference."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: SimpoLossConfig = SimpoLossConfig()


class KtoConfig(PreferenceConfig):
    """Kahneman-Tversky optimization: single completions marked good or bad."""

    samples_per_step: int = Field(16, ge=2)
    """Examples an update is made from; the KL is estimated on these put after each other's
    prompts."""

    data: KtoDataConfig = KtoDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: KtoLossConfig = KtoLossConfig()
