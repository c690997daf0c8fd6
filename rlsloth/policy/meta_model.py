"""A model's modules without weights, on torch's meta device: built in a second or so."""

from __future__ import annotations

from typing import Any

import torch

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.policy.files import READ_ERRORS, locate


def build_meta_model(config: Any, trust_remote_code: bool = False) -> Any:
    """The causal LM of a transformers configuration, frozen, in float32, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation="eager",
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
    model.requires_grad_(False)
    return model


def read_meta_model(cfg: ModelConfig, option: str = "--model.path") -> Any:
    """The model of a configuration on the meta device; none of its weights are read.

    Args:
        option: the command-line option that named the model, for errors.

    Raises:
        UserError: no configuration there, or none of a causal language model.
    """
    try:
        return build_meta_model(locate(cfg).read_config(), cfg.trust_remote_code)
    except READ_ERRORS as error:
        raise UserError(f"{option} {cfg.path}: {first_line(error)}") from error
