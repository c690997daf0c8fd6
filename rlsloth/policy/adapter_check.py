"""Checks of a PEFT adapter's folder, before it is loaded and after."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError
from rlsloth.policy.folder_check import ADAPTER_CONFIG, read_header, read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


def check_adapter_folder(folder: Path) -> None:
    """Check an adapter's files before any library reads them.

    Raises:
        UserError: a file is missing, damaged or pickled, or the configuration asks for more than
            the weights can hold.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(_no_adapter(folder))
    config = read_json(folder / ADAPTER_CONFIG)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        if (folder / PICKLED_WEIGHTS).is_file():
            raise UserError(
                f"adapter {folder} has only {PICKLED_WEIGHTS}, a pickled file, which could run "
                "code when it is read; save it again with PEFT as safetensors"
            )
        raise UserError(
            f"adapter {folder} has no {ADAPTER_WEIGHTS}; copy that file back into the folder, or "
            "pass another adapter or run"
        )
    read_header(weights)
    size = weights.stat().st_size
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    for rank in ranks:
        if isinstance(rank, int) and rank > size:
            raise UserError(
                f"{folder / ADAPTER_CONFIG}: rank {rank} is more than the {size} bytes of "
                f"{ADAPTER_WEIGHTS} can hold; copy the adapter again"
            )
    if config.get("layer_replication"):
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: layer_replication changes the base model's layers, which "
            "is not supported; pass another adapter"
        )


def _no_adapter(folder: Path) -> str:
    inner = folder / "adapter"
    there = (inner / ADAPTER_CONFIG).is_file()
    hint = f"did you mean {inner}?" if there else "pass the folder of a PEFT adapter"
    return f"--model.adapter {folder}: this folder has no {ADAPTER_CONFIG}; {hint}"


def refuse_misfit(wrapped: Any, name: str, folder: Path, path: str, loaded: Any) -> None:
    """Refuse an adapter whose tensors and the model's modules are not the same.

    PEFT would leave a missing tensor at its initial value, so that the adapter does nothing there,
    and drop one that belongs to no module.

    Args:
        wrapped: PEFT's model with the adapter.
        name: PEFT's name of the adapter.
        folder: the adapter's folder.
        path: the base model's path, for the message.
        loaded: result of PEFT's ``load_adapter``.

    Raises:
        UserError: tensors are missing, or belong to no module.
    """
    import peft

    wanted = peft.get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    saved = [key for key in wanted if "lora_" not in key]  # whole modules (modules_to_save)
    found = read_header(folder / ADAPTER_WEIGHTS)
    missing = {*loaded.missing_keys, *(key for key in saved if key not in found)}
    _refuse(missing, loaded.unexpected_keys, folder, path)


def _refuse(missing: Iterable[str], odd: Iterable[str], folder: Path, path: str) -> None:
    lacking, extra = sorted(missing), sorted(odd)
    if lacking or extra:
        raise UserError(
            f"adapter {folder} does not fit base model {path}: {len(lacking)} tensors are missing "
            f"and {len(extra)} belong to no module (first: {min([*lacking, *extra])}); pass the "
            "base model that it was trained on (--model.path, or --base of export and chat)"
        )
