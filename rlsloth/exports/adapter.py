"""A self-contained PEFT folder: adapter, tokenizer and chat template."""

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
    """Write the adapter of ``source`` into ``out``, read it back and fit it to the base's modules.

    The weights are copied as they are. ``base_model_name_or_path`` and ``revision`` in
    adapter_config.json name the base, so that PEFT's AutoPeftModelForCausalLM finds it.

    Returns:
        The number of tensors.

    Raises:
        UserError: no weights, or weights that do not fit the base.
    """
    assert source.adapter is not None
    if not (source.adapter / WEIGHTS).is_file():
        raise UserError(f"adapter {source.adapter} has no {WEIGHTS}")
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
        raise UserError(f"{out / WEIGHTS} does not read back as it was written")
    return _check_fit(source.base, out)


def _check_fit(base: ModelConfig, folder: Path) -> int:
    """Load the adapter onto the base's modules without weights; returns the number of tensors.

    Raises:
        UserError: tensors that are missing, or that have no place.
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
            f"the adapter does not fit {base.path}: {len(wanted - found)} of its tensors are "
            f"missing, {len(found - wanted)} have no place ({min(wanted ^ found)}, ...)"
        )
    return len(found)
