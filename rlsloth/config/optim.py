"""The optimizer section of each loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsloth.config.section import Beta, Section


class OptimConfig(Section):
    """The optimizer of the adapter."""

    name: Literal["auto", "adamw", "adamw_8bit"] = "auto"
    """auto: adamw_8bit (bitsandbytes) on a GPU, torch's AdamW on a CPU."""
    lr: float = Field(2e-5, ge=0)
    """0 samples and measures as ever and changes nothing."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped: int = Field(5, ge=1)
    """Stop after this many steps in a row with a non-finite gradient."""


class SftOptimConfig(OptimConfig):
    """The optimizer of the adapter."""

    lr: float = Field(2e-4, ge=0)
    """QLoRA's (arXiv:2305.14314); an adapter wants about ten times what full fine-tuning does."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"


class PreferenceOptimConfig(OptimConfig):
    """The optimizer of the adapter."""

    lr: float = Field(5e-6, ge=0)
    """An adapter wants about ten times what full fine-tuning does (TRL: 1e-6)."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
