"""Read a model's tokenizer and context length before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.policy.files import locate
from rlsloth.policy.folder_check import refuse_adapter

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
"""Files of which a folder with a tokenizer contains at least one."""


def load_tokenizer(cfg: ModelConfig) -> Any:
    """Load a model's tokenizer.

    Raises:
        UserError: the model has no tokenizer, or it cannot be read.
    """
    files = locate(cfg)
    if files.gguf is None:
        _check_folder(cfg)
    return files.read_tokenizer()


def read_limits(cfg: ModelConfig) -> tuple[int, int]:
    """Read the largest number of tokens of a text (``read_context``), and of embeddings.

    Raises:
        UserError: the model's configuration cannot be read.
    """
    return read_context(cfg), int(locate(cfg).read_config().get_text_config().vocab_size)


def read_context(cfg: ModelConfig) -> int:
    """Read the largest number of tokens that prompt and completion may have together.

    Raises:
        UserError: the model's configuration cannot be read, or ``model.max_context`` exceeds it.
    """
    config = locate(cfg).read_config().get_text_config()
    return context_of(cfg, int(config.max_position_embeddings))


def context_of(model: ModelConfig, limit: int) -> int:
    """Return the tokens that prompt and completion may have together.

    Raises:
        UserError: ``model.max_context`` exceeds the model's ``limit``.
    """
    if model.max_context is not None and model.max_context > limit:
        raise UserError(
            f"--model.max-context {model.max_context} exceeds the {limit} tokens that "
            f"{model.path} supports; pass at most {limit}"
        )
    return model.max_context or limit


def _check_folder(cfg: ModelConfig) -> None:
    path = Path(cfg.path).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(
            f"--model.path {cfg.path} is a file, but not a .gguf file; pass a folder, a .gguf file "
            "or a hub id"
        )
    if path.is_dir():
        refuse_adapter(path)
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"--model.path {path}: the folder has no tokenizer (none of "
            f"{', '.join(TOKENIZER_FILES)}); copy the tokenizer's files of the base model there"
        )
