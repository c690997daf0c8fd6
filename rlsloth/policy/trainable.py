"""Make and save the trained part of a model: an adapter, or weights of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.errors import UserError
from rlsloth.policy.lora import add_adapter, save_adapter
from rlsloth.policy.whole import WholeModel, save_whole

ADAPTER, MODEL = "adapter", "model"
"""Folders of a run with what it trained: PEFT's adapter, or a whole model."""


def make_trainable(base: Any, lora: LoraConfig, source: ModelConfig) -> Any:
    """Wrap a frozen model with what is to be trained, as ``model.trained`` says.

    Args:
        base: transformers' causal language model, changed in place.
        lora: the settings of a new adapter.
        source: the model's configuration.

    Returns:
        PEFT's model, or a WholeModel, which has the methods of PEFT's that the project calls.

    Raises:
        UserError: the adapter, its targets or the names of modules do not fit the model.
    """
    if source.trains_adapter:
        return add_adapter(base, lora, source)
    if base.dtype == torch.float16:  # precision auto on a GPU without bf16
        raise no_bf16(source.trained)
    return WholeModel(base, source.trained, source.path)


def no_bf16(trained: list[str]) -> UserError:
    """Make the error for ``model.trained`` on a card without bf16."""
    return UserError(
        f"--model.trained {' '.join(trained)}: weights do not learn in fp16, and this card has no "
        "bf16; pass --model.precision fp32, or --model.trained adapter"
    )


def save_trained(model: Any, tokenizer: Any, run: Path) -> None:
    """Write what a run trained to its folder: ``adapter`` for PEFT, or ``model`` for transformers.

    Raises:
        UserError: the file system refuses to write.
    """
    if isinstance(model, WholeModel):
        save_whole(model, tokenizer, run / MODEL)
    else:
        save_adapter(model, run / ADAPTER)
