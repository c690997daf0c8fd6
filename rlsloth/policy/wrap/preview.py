"""Preview which modules ``wrap`` would wrap, from a model's configuration alone."""

from __future__ import annotations

from rlsloth.config import ModelConfig
from rlsloth.policy.support import read_meta_model
from rlsloth.policy.wrap.report import WrapReport
from rlsloth.policy.wrap.wrap import wrap


def preview(path: str) -> tuple[str, WrapReport]:
    """Preview which modules would be wrapped, whatever linear layers the LoRA adapts.

    Args:
        path: hub id, folder or GGUF file.

    Returns:
        The name of the model's class, and the report.

    Raises:
        UserError: the configuration cannot be read, or training would refuse the model.
    """
    model = read_meta_model(ModelConfig(path=path), option="--model")
    return type(model).__name__, wrap(model)
