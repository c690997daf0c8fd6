"""The identity of an adapter's base model, kept in ``rlsloth.json`` next to PEFT's files.

An adapter is useless on another base model, but PEFT compares shapes only, and loads it silently
onto any fine-tune of the same architecture.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, fields
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.policy.folder_check import INDEX, WEIGHTS, read_header, weight_files
from rlsloth.policy.gguf import gguf_file

FILE = "rlsloth.json"
IDENTITY = "rlsloth_identity"
"""Name of the attribute under which ``load_model`` stores a model's Identity."""
WINDOWS = 32
"""Windows of a large tensor that are hashed, evenly spread."""
WIDTH = 512
"""Values in a window, so that up to 16,384 values of a tensor are hashed.

If one value in a thousand of a single matrix changed, the hash misses one such change in ten
million; training changes every matrix.
"""
_WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
_FILE_BLOCK = 4096
"""Bytes of a block of a GGUF file."""
_FILE_BLOCKS = 4096
"""Blocks of a GGUF file that are hashed, evenly spread."""
_PROBE = (
    "Two  spaces,\ttab\n\n\n1234567 3.14 can't WE'LL naïve Ελληνικά Русский 中文 日本語 한국어 "
    "עברית 🙂👍🏽 def f(x):\n    return x_1 += 2\r\n"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """A base model and its tokenizer, as they were in training."""

    path: str
    """Hub id, folder or GGUF file, as in ``model.path``."""
    revision: str | None
    """The hub's commit, or the configured revision if there is no commit."""
    weights: str
    """``hash_weights`` of the model's files, whatever the precision: NF4 codes are not hashed."""
    precision: str
    """Precision of the base model in training: nf4, bf16, fp16 or fp32."""
    tokenizer: str
    """``hash_tokenizer`` of the tokenizer."""
    template: str | None
    """``hash_template`` of the chat template; None without one."""


def identify(cfg: ModelConfig, precision: str, model: Any, tokenizer: Any) -> Identity | None:
    """Compute the identity of a base model that was just loaded.

    Args:
        cfg: the model's configuration.
        precision: nf4, bf16, fp16 or fp32.
        model: transformers' model, which knows the hub's commit.
        tokenizer: transformers' tokenizer.

    Returns:
        The identity; None if the model has no safetensors files with the usual names.
    """
    revision = getattr(model.config, "_commit_hash", None) or cfg.revision
    weights = hash_weights(cfg.path, revision)
    if weights is None:
        return None
    return Identity(
        cfg.path, revision, weights, precision, hash_tokenizer(tokenizer), hash_template(tokenizer)
    )


def hash_weights(path: str, revision: str | None = None) -> str | None:
    """Hash a sample of a model's weights with SHA-256.

    For safetensors, this covers the names and shapes of all tensors and evenly spread values as
    float32; about 10 MB of an 8B model are read. The hash depends neither on how tensors are
    distributed over files, nor on whether 16 or 32 bits store the same numbers. For a GGUF file,
    it covers the file's size and evenly spread blocks.

    Args:
        path: folder, GGUF file, or hub id whose files are in the local cache.
        revision: the hub's revision.

    Returns:
        Hexadecimal digits; None if there are no weights.

    Raises:
        UserError: a file is damaged.
    """
    if (file := gguf_file(path)) is not None:
        return _hash_file(file) if file.is_file() else None
    files = _weight_files(path, revision)
    if not files:
        return None
    found: dict[str, bytes] = {}
    for file in files:
        found |= _tensors(file)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\n".encode() + found[name])
    return digest.hexdigest()


def _weight_files(path: str, revision: str | None) -> list[Path]:
    """List the safetensors files that transformers would read; empty if there are none."""
    for name in (WEIGHTS, INDEX):
        if (found := _find(path, name, revision)) is not None:
            return weight_files(found.parent)
    return []


def _find(path: str, name: str, revision: str | None) -> Path | None:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:  # ``path`` is not a hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _tensors(file: Path) -> dict[str, bytes]:
    """Read each tensor's name -> its shape and a sample of its values, as bytes.

    Raises:
        UserError: the file is damaged.
    """
    header, found = read_header(file), {}
    # Unbuffered, because a mapped file or a buffer would read far more than is needed.
    with open(file, "rb", buffering=0) as opened:
        (length,) = struct.unpack("<Q", opened.read(8) or b"")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            width = _WIDTHS.get(entry["dtype"], 1)
            raw = _spread(opened, 8 + length + begin, end - begin, width)
            found[name] = f"{entry['shape']}".encode() + _as_float32(raw, entry["dtype"])
    return found


def _spread(file: RawIOBase, begin: int, count: int, width: int) -> bytes:
    """Read ``count`` bytes from ``begin`` on, or a sample of them if the tensor is large.

    The sample consists of WINDOWS evenly spread windows of WIDTH values of ``width`` bytes each,
    including the first and the last values.

    """
    values, starts, length = count // width, [0], count
    if values > WINDOWS * WIDTH:
        length = WIDTH * width
        starts = [(values - WIDTH) * i // (WINDOWS - 1) * width for i in range(WINDOWS)]
    parts = []
    for start in starts:
        file.seek(begin + start)
        parts.append(file.read(length) or b"")
    return b"".join(parts)


def _as_float32(raw: bytes, dtype: str) -> bytes:
    if dtype == "BF16":  # bf16 is the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).tobytes()
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype("<f4").tobytes()
    return raw if dtype == "F32" else dtype.encode() + raw


def _hash_file(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with open(file, "rb", buffering=0) as opened:
        for i in range(_FILE_BLOCKS):
            opened.seek(max(0, size - _FILE_BLOCK) * i // (_FILE_BLOCKS - 1))
            digest.update(opened.read(_FILE_BLOCK) or b"")
    return digest.hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash a tokenizer with SHA-256, in hexadecimal digits.

    The hash covers the vocabulary, the token ids of a text that is hard to split, and the ids of
    the bos and eos tokens.
    """
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"], ends]
    return _hash_json(facts)


def hash_template(tokenizer: Any) -> str | None:
    """Hash the chat template with SHA-256, in hexadecimal digits; None without a template."""
    return _hash_json(tokenizer.chat_template) if tokenizer.chat_template else None


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_identity(identity: Identity | None, folder: Path, **more: Any) -> None:
    """Write rlsloth.json to a folder: the identity as the key ``base``, and the keys ``more``."""
    base = {} if identity is None else {"base": asdict(identity)}
    (folder / FILE).write_text(json.dumps(base | more, indent=2) + "\n", encoding="utf-8")


def read_identity(folder: Path) -> Identity | None:
    """Read the identity in a folder's rlsloth.json.

    Returns:
        The identity; None if there is none, because another program wrote the adapter.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_bytes()).get("base")
        return base and Identity(**{field.name: base[field.name] for field in fields(Identity)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({first_line(error)}); copy the adapter's folder again"
        ) from error


def refuse_other_base(recorded: Identity, weights: str | None, adapter: Path, path: str) -> None:
    """Refuse a base model whose weights are not those that the adapter was trained on.

    Args:
        recorded: identity in the adapter's folder.
        weights: ``hash_weights`` of the model at ``path``.
        adapter: the adapter's folder, for the message.
        path: the model's path, for the message.

    Raises:
        UserError: the hashes differ.
    """
    if weights != recorded.weights:
        raise UserError(
            f"adapter {adapter} was trained on {recorded.path}, but {path} has different weights: "
            "pass the base model that the adapter was trained on"
        )
