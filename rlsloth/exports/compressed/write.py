"""Compress the weights of a merged folder, one of its files after the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlsloth.errors import UserError
from rlsloth.exports.compressed.scheme import Scheme
from rlsloth.exports.merged import checksums
from rlsloth.exports.stored import Weights
from rlsloth.policy.folder_check import CONFIG, INDEX, read_json

WEIGHT_FILES = shutil.ignore_patterns("*.safetensors", INDEX)


def write_compressed(
    merged: Path, folder: Path, scheme: Scheme, device: torch.device
) -> dict[str, str]:
    """Write configuration, weights and all other files of a merged folder to ``folder``.

    Memory holds the tensors of one file, and one weight in float32. The files keep their names.

    Args:
        merged: a folder of 16-bit weights.
        folder: an existing folder.
        scheme: the layers to compress, and how.
        device: device on which weights are rounded.

    Returns:
        Tensor's name -> checksum (``merged.checksums``).

    Raises:
        UserError: the folder does not name its weights as transformers names its modules.
    """
    stored = Weights(merged)
    linears = {f"{name}.weight" for name in scheme.linears}
    if missing := sorted(linears - stored.shapes.keys()):
        raise UserError(
            f"--to {scheme.to}: weight {missing[0]} has another name in this family's "
            "checkpoints, so that it cannot be compressed; export with --to merged"
        )
    sums: dict[str, str] = {}
    places: dict[str, str] = {}
    size = 0
    for file, names in stored.files.items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensor = stored.read(name)
            if name in linears:
                parts = scheme.compress(tensor.to(device))
                tensors |= {_beside(name, end): part.cpu() for end, part in parts.items()}
            else:
                tensors[name] = tensor
        save_file(tensors, folder / file, metadata={"format": "pt"})
        sums |= checksums(tensors)
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(stored.files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        _write(folder / INDEX, index)
    shutil.copytree(merged, folder, ignore=WEIGHT_FILES, dirs_exist_ok=True)
    _write(folder / CONFIG, read_json(merged / CONFIG) | {"quantization_config": scheme.config()})
    return sums


def read_parts(stored: Weights, linear: str) -> dict[str, Tensor]:
    """Read the tensors of a compressed layer, by the ends of their names."""
    ends = ("weight", "weight_packed", "weight_scale")
    return {end: stored.read(n) for end in ends if (n := f"{linear}.{end}") in stored.shapes}


def _beside(weight: str, end: str) -> str:
    return f"{weight.removesuffix('weight')}{end}"


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
