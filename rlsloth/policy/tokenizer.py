"""What a model's files tell before its weights are loaded: tokenizer, context."""

from __future__ import annotations

import io
import struct
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.policy.gguf_once import parsed_once
from rlsloth.policy.gguf_tokenizer import restore_pretokenizer
from rlsloth.policy.load import pretrained_tokenizer


def place(cfg: ModelConfig) -> tuple[str | Path, dict[str, Any]]:
    """Where transformers finds a model's configuration and tokenizer, and options for it."""
    file = Path(cfg.path).expanduser()
    if file.suffix == ".gguf":
        return file.parent, {"gguf_file": file.name}
    return cfg.path, {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}


def load_tokenizer(cfg: ModelConfig) -> Any:
    """As load_model does. Raises UserError."""
    from transformers import AutoTokenizer

    where, options = place(cfg)
    if "gguf_file" not in options:
        return pretrained_tokenizer(cfg)
    file = Path(cfg.path).expanduser()
    if not file.is_file():
        raise UserError(f"--model.path: no file {file} (looked from {Path.cwd()})")
    try:
        with parsed_once(), redirect_stderr(io.StringIO()):  # its progress bar has no switch
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            restore_pretokenizer(tokenizer, file)
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise _unreadable(cfg, error) from error
    return tokenizer


def read_context(cfg: ModelConfig) -> int:
    """Tokens of prompt and completion that the model is used with. Raises UserError."""
    from transformers import AutoConfig

    where, options = place(cfg)
    try:
        with parsed_once("gguf_file" in options), redirect_stderr(io.StringIO()):
            config = AutoConfig.from_pretrained(where, **options).get_text_config()
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise _unreadable(cfg, error) from error
    limit = int(config.max_position_embeddings)
    return min(cfg.max_context or limit, limit)


def _unreadable(cfg: ModelConfig, error: Exception) -> UserError:
    return UserError(f"--model.path {cfg.path}: {str(error).strip().splitlines()[0][:200]}")
