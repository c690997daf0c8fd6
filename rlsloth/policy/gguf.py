"""GGUF files of models: recognising them, and reading the pre-tokenizer that transformers drops."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError
from rlsloth.policy.compat import gguf_parsed_once
from rlsloth.policy.pretokenizers import ALIASES, DIGITS, GPT2, SPLITS


def gguf_file(path: str | Path) -> Path | None:
    """Return a model's path as a GGUF file if its name ends in .gguf, else None.

    The file need not exist.
    """
    file = Path(path).expanduser()
    return file if file.suffix == ".gguf" else None


@contextmanager
def reading_gguf() -> Iterator[None]:
    """Parse a GGUF file only once, and hide transformers' progress bar, which has no switch."""
    with gguf_parsed_once(), redirect_stderr(io.StringIO()):
        yield


def restore_pretokenizer(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer read from a GGUF file the pre-tokenizer that the file names, in place.

    transformers (5.16 - 5.19) drops it for byte-level BPE, which changes token ids: SmolLM2, for
    example, splits numbers into digits.

    Args:
        tokenizer: transformers' tokenizer.
        path: the GGUF file.

    Raises:
        UserError: a byte-level BPE tokenizer has an unknown pre-tokenizer, so that its token ids
            would be silently wrong.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    kind = _text(fields, "tokenizer.ggml.model")
    if kind != "gpt2":  # sentencepiece vocabularies have no pre-tokenizer
        return
    name = _text(fields, "tokenizer.ggml.pre") or "default"
    split = SPLITS.get(ALIASES.get(name, name))
    if split is None or not split.readable:
        raise UserError(
            f"--model.path {path}: the pre-tokenizer {name!r} of this GGUF file is not supported; "
            "pass the model's folder or hub id"
        )
    if split.steps != (GPT2,):  # that is what transformers assumes
        tokenizer.backend_tokenizer.pre_tokenizer = _pretokenizer(split.steps)


def _pretokenizer(steps: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    made: list[Any] = []
    for step in steps:
        if step == DIGITS:
            made.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != GPT2:
            made.append(pre_tokenizers.Split(Regex(step), "isolated"))
    gpt2 = steps[-1] == GPT2
    made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
    return pre_tokenizers.Sequence(made)


def _text(fields: Any, key: str) -> str | None:
    field = fields.get(key)
    return None if field is None else str(field.contents())
