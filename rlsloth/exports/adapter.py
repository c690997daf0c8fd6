"""Write a self-contained PEFT folder: adapter, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.exports.tokenizer import save_tokenizer
from rlsloth.policy.adapter_check import ADAPTER_WEIGHTS as WEIGHTS
from rlsloth.policy.adapter_check import check_adapter_folder
from rlsloth.policy.compat import forget_parsed_gguf
from rlsloth.policy.folder_check import read_header
from rlsloth.policy.lora import load_adapter
from rlsloth.policy.support import read_meta_model
from rlsloth.training.source import PEFT_CONFIG, Source


def write_adapter(source: Source, tokenizer: Any, out: Path) -> int:
    """Copy the adapter of ``source`` to ``out``, and check that it fits the base model's modules.

    The file of weights is copied byte for byte. ``base_model_name_or_path`` and ``revision`` in
    adapter_config.json are set to the base model, so that PEFT's AutoPeftModelForCausalLM finds it.

    Args:
        source: the trained adapter and its base model; ``source.adapter`` is not None.
        tokenizer: transformers' tokenizer, saved with its chat template.
        out: an existing folder.

    Returns:
        The number of tensors in the adapter.

    Raises:
        UserError: the adapter has no weights, or they do not fit the base model.
    """
    assert source.adapter is not None
    check_adapter_folder(source.adapter)
    shutil.copyfile(source.adapter / WEIGHTS, out / WEIGHTS)
    config = json.loads((source.adapter / PEFT_CONFIG).read_bytes())
    config |= {
        "base_model_name_or_path": source.base.path,
        "revision": source.base.revision,
        "inference_mode": True,
    }
    (out / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_tokenizer(tokenizer, source, out)
    if (source.adapter / WEIGHTS).read_bytes() != (out / WEIGHTS).read_bytes():
        raise UserError(
            f"{out / WEIGHTS} differs from {source.adapter / WEIGHTS}, which was copied to it; "
            "check the disk and export again"
        )
    return _check_fit(source.base, source.adapter)


def _check_fit(base: ModelConfig, folder: Path) -> int:
    """Load the adapter onto the base model's modules on the meta device, without weights.

    Returns:
        The number of tensors in the adapter.

    Raises:
        UserError: the adapter lacks a tensor, or has one that belongs to no module.
    """
    empty = read_meta_model(base)
    forget_parsed_gguf()
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter in the current model")
        load_adapter(empty, folder, base.path, to_train=False)
    return len(read_header(folder / WEIGHTS))
