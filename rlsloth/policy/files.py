"""The files of a model (hub id, folder or GGUF file), and reading them with transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.policy.folder_check import CONFIG, check_config, check_folder, read_json
from rlsloth.policy.gguf import gguf_file, reading_gguf
from rlsloth.policy.gguf_check import check_gguf
from rlsloth.policy.gguf_tokenizer import restore_tokenizer


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The location of a model's files, as arguments of transformers' ``from_pretrained``."""

    source: str
    """Hub id or folder."""
    options: dict[str, Any]
    """Keyword arguments of ``from_pretrained``."""
    gguf: Path | None
    """The GGUF file; None for a hub id or a folder with safetensors."""
    option: str = "--model.path"
    """The command-line option that named the model, for messages."""

    @property
    def path(self) -> str:
        """The model's path as the user knows it."""
        return self.source if self.gguf is None else str(self.gguf)

    @property
    def folder(self) -> Path | None:
        """The model's folder; None for a hub id or a GGUF file."""
        folder = Path(self.source)
        return folder if self.gguf is None and folder.is_dir() else None

    def read_config(self) -> Any:
        """Read the model's configuration.

        Raises:
            UserError: it cannot be read, or is refused (folder_check.py, gguf_check.py).
        """
        from transformers import AutoConfig

        self.check()
        with self.reading(), self.refusing():
            config = AutoConfig.from_pretrained(self.source, **self.options)
            config.get_text_config()
        return config

    def read_tokenizer(self) -> Any:
        """Read the tokenizer, with the settings of a GGUF file that transformers drops.

        Raises:
            UserError: the files cannot be read, or name an unknown pre-tokenizer.
        """
        from transformers import AutoTokenizer

        self.check()
        with self.reading(), self.refusing():
            if self.gguf is None:
                tokenizer = AutoTokenizer.from_pretrained(self.source, **self.options)
                tokenizer("a")  # settings of a wrong type show only here
                return tokenizer
            found = self.gguf.stat()
            return copy.deepcopy(_gguf_tokenizer(self.gguf, found.st_mtime_ns, found.st_size))

    def check(self) -> None:
        """Raise UserError for files that no library may read."""
        if self.gguf is not None:
            check_gguf(self.gguf, self.option)
        elif self.folder is not None:
            check_folder(self.folder)
        elif self.source.startswith(("/", "./", "../", "~")):
            raise UserError(
                f"{self.option} {self.source}: there is no such folder or file (current folder: "
                f"{Path.cwd()}); check the path"
            )
        elif (file := self._downloaded(CONFIG)) is not None:
            check_config(read_json(file), f"{CONFIG} of {self.source}", None)

    def _downloaded(self, name: str) -> Path | None:
        """Download a small file of a hub model; None if it cannot be had."""
        from transformers.utils import cached_file

        try:
            found = cached_file(
                self.source,
                name,
                revision=self.options["revision"],
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except (OSError, ValueError):  # reading the configuration reports this
            return None
        return None if found is None else Path(found)

    def snapshot(self, more: Iterable[str] = ()) -> Path | None:
        """Return the folder of a hub model in the local cache; None if it has none.

        Args:
            more: small files to download, too, if the model has them.
        """
        file = self._downloaded(CONFIG)
        for name in more:
            self._downloaded(name)
        return None if file is None else file.parent

    def reading(self) -> AbstractContextManager[None]:
        """Return a context manager in which GGUF files are parsed once and without output."""
        return nullcontext() if self.gguf is None else reading_gguf()

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn whatever a library raises for these files into a UserError.

        Raises:
            UserError: the library failed.
            torch.OutOfMemoryError: passed on.
        """
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self.unreadable(error) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tokenizers' own, of Rust
                raise
            raise self.unreadable(error) from error

    def unreadable(self, error: BaseException) -> UserError:
        """Make the error to raise for a model that transformers cannot read."""
        reason = first_line(error) if str(error).strip() else type(error).__name__
        if isinstance(error, (KeyError, AttributeError, TypeError, IndexError, AssertionError)):
            reason = f"{type(error).__name__}: {reason}"
        if self.gguf is not None:
            return UserError(
                f"{self.option} {self.path}: transformers cannot read this GGUF file: {reason}; "
                "download it again, or pass the model's folder or hub id"
            )
        if self.folder is not None:
            return UserError(
                f"{self.option} {self.path}: cannot read the model: {reason}; check that its files "
                "are complete"
            )
        return UserError(
            f"{self.option} {self.path}: cannot load this model from the hub ({reason}); check its "
            "name, or pass a folder or a GGUF file when offline"
        )


@lru_cache(maxsize=1)
def _gguf_tokenizer(file: Path, _changed: int, _size: int) -> Any:
    """Read the tokenizer of a GGUF file; for 262,000 tokens without merges it takes a minute."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    restore_tokenizer(tokenizer, file)
    return tokenizer


def locate(cfg: ModelConfig, option: str = "--model.path") -> ModelFiles:
    """Locate the files of the model that a configuration names; nothing is read yet.

    Args:
        cfg: the model.
        option: the command-line option that named it, for messages.
    """
    if (file := gguf_file(cfg.path)) is not None:
        return ModelFiles(str(file.parent), {"gguf_file": file.name}, file, option)
    options = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    folder = Path(cfg.path).expanduser()
    return ModelFiles(str(folder) if folder.is_dir() else cfg.path, options, None, option)
