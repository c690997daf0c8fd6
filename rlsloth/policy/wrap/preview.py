"""A preview of what ``wrap`` does to a model, from its configuration alone."""

from __future__ import annotations

from rlsloth.config import ModelConfig
from rlsloth.policy.meta_model import read_meta_model
from rlsloth.policy.wrap.report import WrapReport
from rlsloth.policy.wrap.wrap import wrap


def preview(path: str) -> tuple[str, WrapReport]:
    """The model's class and what of it would be wrapped, with a LoRA on any of its linears.

    Raises:
        UserError: no configuration there, or none of a causal language model.
    """
    model = read_meta_model(ModelConfig(path=path), option="--model")
    return type(model).__name__, wrap(model)
