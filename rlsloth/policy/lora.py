"""Putting the LoRA on a frozen base, fresh or from a PEFT folder, and saving it as one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.records import UserError

TRAINED = "default"
REFERENCE = "reference"


def add_adapter(model: Any, lora: LoraConfig, source: ModelConfig) -> Any:
    """Wrap ``model`` with a trainable adapter; PEFT keeps its weights in float32.

    A starting adapter (``source.adapter``) is loaded twice: once to train, once frozen as the
    reference.

    Raises:
        UserError: the adapter folder is missing or does not fit the model; a target matches no
        module.
    """
    import peft

    if source.adapter is not None:
        return _load(model, source.adapter.expanduser())
    targets = _linears(model) if lora.targets == ["all-linear"] else list(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    names = [name for name, _ in model.named_modules()]
    unmatched = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora.targets {' '.join(lora.targets)}: {error}") from error
    # PEFT maps the names of experts to their stacked parameters, for the models that it knows.
    if unmatched and not config.target_parameters:
        raise UserError(f"--lora.targets {unmatched[0]}: no module of {model.name_or_path} has it")
    return adapted


def _linears(model: Any) -> list[str]:
    """The names of all linears but the output head.

    PEFT's own "all-linear" also adapts the experts and the router of a Qwen3-MoE: a copy of all
    expert weights at every forward.
    """
    head = model.get_output_embeddings()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return sorted({name.rpartition(".")[2] for name in linears})


def _load(model: Any, folder: Path) -> Any:
    import peft

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"--model.adapter {folder}: no adapter_config.json there")
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder), TRAINED, is_trainable=True)
        wrapped.load_adapter(str(folder), REFERENCE, is_trainable=False)
    except (RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"--model.adapter {folder} does not fit {model.name_or_path}: {first}"
        ) from error
    wrapped.set_adapter(TRAINED)
    return wrapped


def save_adapter(model: Any, folder: Path) -> None:
    """Write the trained adapter as a PEFT folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # Embeddings are never resized here; "auto" would ask the hub whether they were.
        model.save_pretrained(
            str(temporary), selected_adapters=[TRAINED], save_embedding_layers=False
        )
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the adapter to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
