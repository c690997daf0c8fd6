"""Build a model's modules without weights, on torch's meta device, in about a second."""

from __future__ import annotations

from typing import Any

import torch

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.policy.files import READ_ERRORS, locate


def build_meta_model(config: Any, trust_remote_code: bool = False) -> Any:
    """Build the causal language model of a transformers configuration on the meta device.

    It is frozen and in float32.
    """
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
    """Read a model's configuration and build the model on the meta device, without its weights.

    Args:
        cfg: the model to read.
        option: the command-line option that named the model, for messages.

    Raises:
        UserError: the configuration cannot be read, or is not a causal language model's.
    """
    try:
        return build_meta_model(locate(cfg).read_config(), cfg.trust_remote_code)
    except READ_ERRORS as error:
        raise UserError(
            f"{option} {cfg.path}: cannot read a causal language model's configuration: "
            f"{first_line(error)}; check the path or hub id"
        ) from error
