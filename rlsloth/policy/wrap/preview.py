"""What ``wrap`` would do to a model, from its configuration alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch

from rlsloth.errors import UserError
from rlsloth.policy.wrap.report import WrapReport
from rlsloth.policy.wrap.wrap import wrap


def preview(path: str) -> tuple[str, WrapReport]:
    """The model's class and what of it would be wrapped, with a LoRA on any of its linears.

    The model is built without weights, in a second or so.

    Raises:
        UserError: no configuration there, or none of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = _config(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--model {path}: {first}") from error
    model.requires_grad_(False)
    return type(model).__name__, wrap(model)


def _config(path: str) -> Any:
    from transformers import AutoConfig

    file = Path(path).expanduser()
    if file.suffix == ".gguf":
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    return AutoConfig.from_pretrained(path)
