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
from rlsloth.policy.compat import forget_parsed_gguf
from rlsloth.policy.lora import TRAINED, load_adapter
from rlsloth.policy.meta_model import read_meta_model
from rlsloth.training.source import PEFT_CONFIG, Source

WEIGHTS = "adapter_model.safetensors"


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
    if not (source.adapter / WEIGHTS).is_file():
        raise UserError(
            f"adapter {source.adapter} has no {WEIGHTS}; copy that file back into the folder, or "
            "pass another adapter or run"
        )
    shutil.copyfile(source.adapter / WEIGHTS, out / WEIGHTS)
    config = json.loads((source.adapter / PEFT_CONFIG).read_bytes())
    config |= {
        "base_model_name_or_path": source.base.path,
        "revision": source.base.revision,
        "inference_mode": True,
    }
    (out / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)
    if (source.adapter / WEIGHTS).read_bytes() != (out / WEIGHTS).read_bytes():
        raise UserError(
            f"{out / WEIGHTS} differs from {source.adapter / WEIGHTS}, which was copied to it; "
            "check the disk and export again"
        )
    return _check_fit(source.base, out)


def _check_fit(base: ModelConfig, folder: Path) -> int:
    """Load the adapter onto the base model's modules on the meta device, without weights.

    Returns:
        The number of tensors in the adapter.

    Raises:
        UserError: the adapter lacks a tensor, or has one that belongs to no module.
    """
    import peft
    from safetensors import safe_open

    empty = read_meta_model(base)
    forget_parsed_gguf()
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter in the current model")
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        model = load_adapter(empty, folder, base.path, to_train=False)
    wanted = set(
        peft.get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
    )
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = set(file.keys())
    if wanted != found:
        raise UserError(
            f"adapter {folder} does not fit base model {base.path}: {len(wanted - found)} tensors "
            f"are missing and {len(found - wanted)} belong to no module (first: "
            f"{min(wanted ^ found)}); pass the base model that it was trained on with --base"
        )
    return len(found)
