"""The shape of a model that is not loaded, and its longest prompt, from its configuration alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from rlsloth.config import EnvConfig, LoraConfig, ModelConfig
from rlsloth.errors import UserError
from rlsloth.memory.shape import ModelShape, read_shape
from rlsloth.policy.files import READ_ERRORS, locate
from rlsloth.policy.meta_model import read_meta_model
from rlsloth.records import Prompt

TOKENIZED = 64
"""Prompts of the most characters that are tokenised to find the longest."""


def model_shape(model: ModelConfig, lora: LoraConfig) -> ModelShape:
    """Build the model on meta with its adapter and kernels, as Policy makes it, and read its shape.
    It takes some seconds.

    Raises:
        UserError: no configuration there, or targets or an adapter that do not fit it.
    """
    from rlsloth.policy.lora import add_adapter
    from rlsloth.policy.wrap.wrap import wrap

    built = read_meta_model(model)
    with torch.device("meta"), warnings.catch_warnings():
        # Only the shapes of a starting adapter arrive on meta, and torch warns for each tensor.
        warnings.filterwarnings("ignore", message=".*meta parameter in the current model")
        built = add_adapter(built, lora, model)
    if model.fused_kernels:
        wrap(built)
    try:
        shape = read_shape(built)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"--model.path {model.path}: the memory of {type(built.get_base_model()).__name__} "
            f"is not known ({str(error)[:100]})"
        ) from error
    _refuse_nf4_experts(model, shape)
    return shape


def _refuse_nf4_experts(model: ModelConfig, shape: ModelShape) -> None:
    """Refuse what loading refuses (policy.load). Raises UserError."""
    every = sum(weight.count for weight in shape.weights)
    experts = sum(weight.count for weight in shape.weights if weight.group == "experts")
    if model.precision == "nf4" and 2 * experts > every:
        raise UserError(
            f"--model.precision nf4: {experts / every:.0%} of the weights of {model.path} are "
            "experts, which bitsandbytes does not quantise; pass --model.precision bf16"
        )


def longest_prompt(model: ModelConfig, env: EnvConfig, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt, among the TOKENIZED of most characters; 0 without a
    tokenizer."""
    from rlsloth.data.renderer import Renderer

    def characters(prompt: Prompt) -> int:
        return len(prompt.messages if isinstance(prompt.messages, str) else str(prompt.messages))

    try:
        renderer = Renderer(locate(model).read_tokenizer(), env)
        longest = sorted(prompts, key=characters)[-TOKENIZED:]
        return max((len(renderer.prompt_ids(prompt)) for prompt in longest), default=0)
    except (UserError, *READ_ERRORS):
        return 0
