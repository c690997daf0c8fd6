"""Build a model's modules without weights, on torch's meta device, in about a second."""

from __future__ import annotations

import copy
from typing import Any

import torch


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


def without_weights(base: Any, dtype: torch.dtype, **changes: Any) -> Any:
    """Build the base model's class on the meta device, configured for unquantised weights.

    Args:
        base: transformers' model.
        dtype: type of the weights.
        changes: configuration keys to set.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        # Code shipped with the model is allowed here only if it was when the base was loaded.
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=base.is_remote_code(),
        )
    model.generation_config = copy.deepcopy(base.generation_config)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # such as a temperature without sampling, which transformers would not save
        model.generation_config.do_sample = True
    return model
