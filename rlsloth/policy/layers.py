"""Parts of a transformers model."""

from __future__ import annotations

from typing import Any

from torch import nn


def base_of(model: Any) -> Any:
    """Return transformers' model, of itself or of what trains it: PEFT's model or WholeModel."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(decoder: nn.Module) -> list[Any]:
    """List the layers that transformers can checkpoint one by one, in the model's order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
