"""Build a model's modules without weights, on torch's meta device, in about a second."""

from __future__ import annotations

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
