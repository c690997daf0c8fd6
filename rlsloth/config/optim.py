"""The section ``optim`` of each loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsloth.config.section import Beta, Section


class OptimConfig(Section):
    """The optimizer of the adapter."""

    name: Literal["auto", "adamw", "adamw_8bit"] = "auto"
    """Optimizer. auto: adamw_8bit (bitsandbytes) on a GPU, torch's AdamW on a CPU."""
    lr: float = Field(default=2e-5, ge=0)
    """Learning rate. With 0 the run samples and logs, and the weights stay as they are."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """AdamW's decay rates."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last update."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer updates over which the learning rate rises to lr: by lr / warmup_steps with each,
    the first included."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    offload: bool = False
    """Keep the optimizer's states in host memory between updates. Frees 2 bytes a trained weight
    with adamw_8bit and 8 with adamw, for two copies an update."""
    max_skipped: int = Field(default=5, ge=1)
    """Stop after this many steps in a row whose gradient is NaN or infinite."""


class SftOptimConfig(OptimConfig):
    """The optimizer of the adapter."""

    lr: float = Field(default=2e-4, ge=0)
    """Learning rate; the default is that of QLoRA (arXiv:2305.14314). An adapter needs about ten
    times the rate of full fine-tuning."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the last update."""


class PreferenceOptimConfig(OptimConfig):
    """The optimizer of the adapter."""

    lr: float = Field(default=5e-6, ge=0)
    """Learning rate. An adapter needs about ten times the rate of full fine-tuning."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the last update."""
