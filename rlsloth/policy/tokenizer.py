"""The tokenizer and the context length of a model, read before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.policy.files import READ_ERRORS, locate, unreadable

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""A folder without any of them holds no tokenizer."""


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The tokenizer of a model. Raises UserError."""
    files = locate(cfg)
    if files.gguf is not None:
        check_gguf_exists(files.gguf)
    else:
        _check_folder(cfg)
    try:
        return files.read_tokenizer()
    except READ_ERRORS as error:
        raise unreadable(cfg, error) from error


def read_context(cfg: ModelConfig) -> int:
    """The tokens that prompt and completion may have together. Raises UserError."""
    try:
        config = locate(cfg).read_config().get_text_config()
    except READ_ERRORS as error:
        raise unreadable(cfg, error) from error
    limit = int(config.max_position_embeddings)
    return min(cfg.max_context or limit, limit)


def check_gguf_exists(file: Path) -> None:
    """Raises UserError where there is no such file."""
    if not file.is_file():
        raise UserError(f"--model.path: no file {file} (looked from {Path.cwd()})")


def _check_folder(cfg: ModelConfig) -> None:
    path = Path(cfg.path).expanduser()
    if cfg.path.startswith(("/", "./", "../", "~")) and not path.exists():
        raise UserError(f"--model.path {cfg.path}: no such folder or file")
    if path.exists() and not path.is_dir():
        raise UserError(
            f"--model.path {cfg.path} is a file; pass a folder, a .gguf file or a hub id"
        )
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the tokenizer "
            "files of the base model there"
        )
