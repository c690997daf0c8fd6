"""Tensors of a model folder, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlsloth.errors import UserError, first_line
from rlsloth.policy.folder_check import INDEX, WEIGHTS


class Weights:
    """The safetensors files of a folder: shapes are read at once, values on demand.

    Raises:
        UserError: there are no weights, or they cannot be read.
    """

    files: dict[str, list[str]]
    """A file's name -> names of its tensors."""
    shapes: dict[str, tuple[int, ...]]
    """A tensor's name -> its sizes."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        index = folder / INDEX
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = [WEIGHTS]
        self.files, self.shapes = {}, {}
        self._file: dict[str, Any] = {}
        for name in names:
            try:
                file: Any = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{folder / name}: cannot read weights: {first_line(error)}; check that the "
                    "model's files are complete"
                ) from error
            self.files[name] = list(file.keys())
            for key in self.files[name]:
                self.shapes[key] = tuple(file.get_slice(key).get_shape())
                self._file[key] = file

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in the type in which it is stored."""
        value: torch.Tensor = self._file[name].get_tensor(name)
        return value
