"""A model's files as transformers reads them: a hub id, a folder or a GGUF file."""

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
    """Arguments of transformers' ``from_pretrained`` for a model."""

    source: str
    """Hub id or folder."""
    options: dict[str, Any]
    """Keyword arguments that go with it."""
    gguf: Path | None
    """The GGUF file; None for a hub id or a folder of other files."""

    def read_config(self) -> Any:
        """transformers' configuration. Raises one of READ_ERRORS."""
        from transformers import AutoConfig

        with self.reading():
            return AutoConfig.from_pretrained(self.source, **self.options)

    def read_tokenizer(self) -> Any:
        """The tokenizer, with the pre-tokenizer that a GGUF file names.

        Raises:
            UserError: a pre-tokenizer that is not known here.
            One of READ_ERRORS: files that cannot be read.
        """
        from transformers import AutoTokenizer

        with self.reading():
            tokenizer = AutoTokenizer.from_pretrained(self.source, **self.options)
            if self.gguf is not None:
                restore_pretokenizer(tokenizer, self.gguf)
        return tokenizer

    def reading(self) -> AbstractContextManager[None]:
        """The context to read them in."""
        return nullcontext() if self.gguf is None else reading_gguf()


def locate(cfg: ModelConfig) -> ModelFiles:
    """The files of a configuration's model."""
    if (file := gguf_file(cfg.path)) is not None:
        return ModelFiles(str(file.parent), {"gguf_file": file.name}, file)
    options = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    return ModelFiles(cfg.path, options, None)


def unreadable(cfg: ModelConfig, error: Exception) -> UserError:
    """The error to raise for a model that transformers cannot read."""
    if gguf_file(cfg.path) is not None or Path(cfg.path).expanduser().is_dir():
        return UserError(f"--model.path {cfg.path}: {first_line(error)}")
    return UserError(
        f"cannot load model {cfg.path!r} from the hub ({first_line(error)}); offline, pass a "
        "folder or a GGUF file with --model.path"
    )
