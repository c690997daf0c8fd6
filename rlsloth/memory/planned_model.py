"""Read a model's shape and the length of its longest prompt without loading its weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rlsloth.config import EnvConfig, LoraConfig, ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.memory.cards import UNKNOWN, Card
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.shape import ModelShape
from rlsloth.policy.attention.backends import choose_backend
from rlsloth.policy.files import locate
from rlsloth.policy.support import read_meta_model
from rlsloth.records import Prompt

TOKENIZED = 64
"""Number of prompts, those with the most characters, that are tokenised to find the longest."""


def model_shape(model: ModelConfig, lora: LoraConfig, card: Card = UNKNOWN) -> ModelShape:
    """Build a model with its adapter and kernels on the meta device, and read its shape.

    The model is built as Policy builds it; this takes some seconds. Cards without bfloat16 have no
    attention but torch's own.

    Raises:
        UserError: the configuration cannot be read, or the targets or the adapter do not fit it.
    """
    from rlsloth.policy.trainable import make_trainable
    from rlsloth.policy.wrap.wrap import wrap

    built = read_meta_model(model)
    with torch.device("meta"), warnings.catch_warnings():
        # torch warns for each tensor of a starting adapter that its values are not loaded.
        warnings.filterwarnings("ignore", message=".*meta parameter in the current model")
        built = make_trainable(built, lora, model)
    if model.fused_kernels:
        wrap(built)
    try:
        shape = read_shape(built)
        backend = planned_backend(model.attention, built) if card.bf16 else "sdpa"
        return replace(shape, attention=backend)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--model.path {model.path}: cannot plan the memory of "
            f"{type(built.get_base_model()).__name__} ({first_line(error, 100)}); pass "
            "--tokens-per-microbatch and --model.gradient-checkpointing instead of a plan"
        ) from error


def planned_backend(wanted: str, model: Any) -> str:
    """Name the attention backend of training: this machine's, or without a GPU the most usual one.

    Args:
        wanted: value of ``model.attention``.
        model: the model.
    """
    if not torch.cuda.is_available():
        return "varlen" if wanted == "auto" else wanted
    config, device = model.get_base_model().config.get_text_config(), torch.device("cuda")
    count = model.get_base_model().num_parameters()
    return choose_backend(wanted, device, torch.bfloat16, config, count)


def longest_prompt(model: ModelConfig, env: EnvConfig, prompts: Sequence[Prompt]) -> int:
    """Count the tokens of the longest of the TOKENIZED prompts with the most characters.

    Returns 0 if the model's tokenizer cannot be read.
    """
    from rlsloth.data.renderer import Renderer

    def characters(prompt: Prompt) -> int:
        return len(prompt.messages if isinstance(prompt.messages, str) else str(prompt.messages))

    try:
        renderer = Renderer(locate(model).read_tokenizer(), env)
        longest = sorted(prompts, key=characters)[-TOKENIZED:]
        return max((len(renderer.prompt_ids(prompt)) for prompt in longest), default=0)
    except UserError:
        return 0
