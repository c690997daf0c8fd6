"""The pre-tokenizer that a GGUF file names, put back.

transformers (5.16 - 5.19) drops it for byte-level BPE, which changes token ids: SmolLM2 splits
numbers into digits. The names are llama.cpp's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers

from rlsloth.errors import UserError

# The split patterns are those in the models' own tokenizer.json files (Llama 3, Qwen 2).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def restore_pretokenizer(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer read from a GGUF file the pre-tokenizer the file names, in place.

    Raises:
        UserError: byte-level BPE with a pre-tokenizer not known here: ids would be silently wrong.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    kind = _text(fields, "tokenizer.ggml.model")
    if kind != "gpt2":  # sentencepiece vocabularies have no pre-tokenizer
        return
    name = _text(fields, "tokenizer.ggml.pre") or "default"
    if name in ("default", "gpt-2"):
        return
    if name == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = _digits()
    elif name in ("llama-bpe", "llama3", "llama-v3"):
        tokenizer.backend_tokenizer.pre_tokenizer = _split(_LLAMA3)
    elif name in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.backend_tokenizer.pre_tokenizer = _split(_QWEN2)
    else:
        raise UserError(
            f"{path}: unknown GGUF pre-tokenizer {name!r}; pass the model's folder or hub id"
        )


def _text(fields: Any, key: str) -> str | None:
    field = fields.get(key)
    return None if field is None else str(field.contents())
