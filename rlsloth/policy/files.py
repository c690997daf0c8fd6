"""The files of a model (hub id, folder or GGUF file), and reading them with transformers."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.policy.gguf import gguf_file, reading_gguf, restore_pretokenizer

READ_ERRORS = (OSError, ValueError, KeyError, RuntimeError, struct.error)
"""Exceptions that transformers raises for files that it cannot read."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The location of a model's files, as arguments of transformers' ``from_pretrained``."""

    source: str
    """Hub id or folder."""
    options: dict[str, Any]
    """Keyword arguments of ``from_pretrained``."""
    gguf: Path | None
    """The GGUF file; None for a hub id or a folder with safetensors."""

    def read_config(self) -> Any:
        """Read the model's configuration; raises one of READ_ERRORS if it cannot be read."""
        from transformers import AutoConfig

        with self.reading():
            return AutoConfig.from_pretrained(self.source, **self.options)

    def read_tokenizer(self) -> Any:
        """Read the tokenizer, with the pre-tokenizer that a GGUF file names.

        Raises:
            UserError: the GGUF file names an unknown pre-tokenizer.
            One of READ_ERRORS: the files cannot be read.
        """
        from transformers import AutoTokenizer

        with self.reading():
            tokenizer = AutoTokenizer.from_pretrained(self.source, **self.options)
            if self.gguf is not None:
                restore_pretokenizer(tokenizer, self.gguf)
        return tokenizer

    def reading(self) -> AbstractContextManager[None]:
        """Return a context manager in which GGUF files are parsed once and without output."""
        return nullcontext() if self.gguf is None else reading_gguf()


def locate(cfg: ModelConfig) -> ModelFiles:
    """Locate the files of the model that a configuration names; nothing is read yet."""
    if (file := gguf_file(cfg.path)) is not None:
        return ModelFiles(str(file.parent), {"gguf_file": file.name}, file)
    options = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    return ModelFiles(cfg.path, options, None)


def unreadable(cfg: ModelConfig, error: Exception) -> UserError:
    """Make the error to raise for a model that transformers cannot read."""
    if gguf_file(cfg.path) is not None or Path(cfg.path).expanduser().is_dir():
        return UserError(
            f"--model.path {cfg.path}: cannot read the model: {first_line(error)}; check that its "
            "files are complete"
        )
    return UserError(
        f"--model.path {cfg.path}: cannot load this model from the hub ({first_line(error)}); "
        "check its name, or pass a folder or a GGUF file when offline"
    )
