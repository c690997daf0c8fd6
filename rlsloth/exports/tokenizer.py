"""The tokenizer and chat template that go with an exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.exports.transformers4 import name_old_class
from rlsloth.policy.files import ModelFiles, locate
from rlsloth.policy.identity import hash_template, hash_tokenizer
from rlsloth.training.source import PEFT_CONFIG, Source

_WHOLE = ("tokenizer.json", "tokenizer_config.json")
"""Files without which a folder has no whole tokenizer."""
_FURTHER = (
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_PROCESSOR = ("*processor*.json", "chat_template.json")


def base_folder(base: ModelConfig) -> Path | None:
    """Return the folder with the base model's files; None for a GGUF file or without a cache."""
    files = locate(base)
    if files.gguf is not None:
        return None
    return files.folder or files.snapshot(("preprocessor_config.json", "processor_config.json"))


def export_tokenizer(source: Source) -> Any:
    """Return the tokenizer to export: the adapter folder's if it has one, else the base model's.

    Raises:
        UserError: the tokenizer or its chat template has changed since training, or it has tokens
            without trained embeddings.
    """
    base, rows = _read_base(source.base)
    adapter = source.adapter
    tokenizer, place = base, source.base.path
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        tokenizer, place = _read(str(adapter)), str(adapter)
    _check_tokens(tokenizer, base, rows, place, adapter)
    if source.identity is not None:
        if source.identity.template is not None and not tokenizer.chat_template:
            raise UserError(
                f"{place} has lost its chat template, but adapter {adapter} was trained with one; "
                "restore it (chat_template.jinja or tokenizer_config.json)"
            )
        if hash_template(tokenizer) != source.identity.template:
            raise UserError(
                f"the chat template of {place} is not the one that adapter {adapter} was trained "
                "with; restore the template of training"
            )
        if hash_tokenizer(tokenizer) != source.identity.tokenizer:
            raise UserError(
                f"the tokenizer of {place} is not the one that adapter {adapter} was trained with: "
                "its tokens, or its way of splitting text, have changed; restore the tokenizer of "
                "training"
            )
    return tokenizer


def save_tokenizer(tokenizer: Any, source: Source, folder: Path) -> None:
    """Write the tokenizer's files, unchanged where the source has them, and check them.

    transformers 5 would rewrite them for itself.

    Args:
        tokenizer: the result of ``export_tokenizer``.
        source: the trained model.
        folder: an existing folder.

    Raises:
        UserError: the files read back give another tokenizer.
    """
    adapter = source.adapter
    base = base_folder(source.base)
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    place = adapter if own else base
    if place is not None and all((place / name).is_file() for name in _WHOLE):
        for name in (*_WHOLE, *_FURTHER):
            if (place / name).is_file():
                shutil.copyfile(place / name, folder / name)
        if (place / _TEMPLATES).is_dir():
            shutil.copytree(place / _TEMPLATES, folder / _TEMPLATES)
    else:
        tokenizer.save_pretrained(folder)
    name_old_class(folder)
    again = _read(str(folder))
    if (hash_tokenizer(again), hash_template(again)) != (
        hash_tokenizer(tokenizer),
        hash_template(tokenizer),
    ):
        raise UserError(
            f"the tokenizer written to {folder} reads back as another one; check the files of "
            f"{place}"
        )


def copy_processors(base: ModelConfig, folder: Path) -> None:
    """Copy the files of a multimodal base model's processor, without which it does not load."""
    place = base_folder(base)
    if place is None:
        return
    for pattern in _PROCESSOR:
        for file in place.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _check_tokens(tokenizer: Any, base: Any, rows: int, place: str, adapter: Path | None) -> None:
    """Refuse tokens that have no row in the embedding, or whose row was never trained.

    Args:
        tokenizer: the tokenizer to export.
        base: the base model's tokenizer.
        rows: number of rows of the base model's embedding.
        place: path of ``tokenizer``, for messages.
        adapter: PEFT folder; None without an adapter.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if beyond:
        index, token = beyond[0]
        raise UserError(
            f"{place}: token {token!r} has id {index}, but the model has only {rows} embeddings; "
            f"{len(beyond)} tokens were added without embeddings: remove them from tokenizer.json "
            "(added_tokens), or resize the model's embeddings"
        )
    known = base.get_vocab()
    added = sorted(token for token in vocabulary if token not in known)
    if added and not _trains_embeddings(adapter):
        raise UserError(
            f"{place}: {len(added)} tokens ({added[0]!r}, ...) are not in the base model's "
            f"tokenizer, and adapter {adapter} did not train embeddings for them: remove them from "
            "the tokenizer"
        )


def _trains_embeddings(adapter: Path | None) -> bool:
    if adapter is None:
        return False
    config = json.loads((adapter / PEFT_CONFIG).read_bytes())
    names = [*(config.get("modules_to_save") or ()), *(config.get("target_modules") or ())]
    embeds = any("embed" in name or "wte" in name for name in names)
    return embeds or bool(config.get("trainable_token_indices"))


def _read_base(base: ModelConfig) -> tuple[Any, int]:
    """Read the base model's tokenizer and the number of rows of its embedding."""
    files = locate(base, "base model")
    with files.reading():
        config, tokenizer = files.read_config(), files.read_tokenizer()
    if files.gguf is not None:
        tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer, int(config.get_text_config().vocab_size)


def _read(folder: str) -> Any:
    """Read the tokenizer in an adapter's folder."""
    from transformers import AutoTokenizer

    files = ModelFiles(folder, {}, None, "adapter")
    with files.refusing():
        return AutoTokenizer.from_pretrained(folder)
