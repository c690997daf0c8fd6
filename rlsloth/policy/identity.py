"""The base model that an adapter was trained on, as ``rlsloth.json`` next to PEFT's files.

An adapter means nothing on another base, and PEFT looks at shapes only: a fine-tune of the same
architecture takes it silently.
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
from rlsloth.errors import UserError
from rlsloth.policy.gguf import gguf_file

FILE = "rlsloth.json"
IDENTITY = "rlsloth_identity"
"""Attribute of a transformers model that ``load_model`` has loaded: its Identity."""
WINDOWS = 32
WIDTH = 512
"""Values in a window: of a larger tensor 16,384 values are hashed. Where one value in a thousand of
a single matrix was changed, one case in ten million is missed; training changes every matrix."""
_WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
_FILE_BLOCK = 4096
_FILE_BLOCKS = 4096
_PROBE = (
    "Two  spaces,\ttab\n\n\n1234567 3.14 can't WE'LL naïve Ελληνικά Русский 中文 日本語 한국어 "
    "עברית 🙂👍🏽 def f(x):\n    return x_1 += 2\r\n"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """A base model and its tokenizer, as training saw them."""

    path: str
    """Hub id, folder or GGUF file, as configured."""
    revision: str | None
    """The hub's commit, or the revision in the configuration."""
    weights: str
    """``hash_weights`` of the files. In NF4, too: the packed codes play no part."""
    precision: str
    """nf4, bf16 or fp32: what the base was held in."""
    tokenizer: str
    """``hash_tokenizer``."""
    template: str | None
    """``hash_template``; None without a chat template."""


def identify(cfg: ModelConfig, precision: str, model: Any, tokenizer: Any) -> Identity | None:
    """The identity of a base that was just loaded; None where its weights are in no safetensors
    files of the usual names.

    Args:
        precision: nf4, bf16 or fp32.
        model: transformers' model, which knows the hub's commit.
    """
    revision = getattr(model.config, "_commit_hash", None) or cfg.revision
    weights = hash_weights(cfg.path, revision)
    if weights is None:
        return None
    return Identity(
        cfg.path, revision, weights, precision, hash_tokenizer(tokenizer), hash_template(tokenizer)
    )


def hash_weights(path: str, revision: str | None = None) -> str | None:
    """SHA-256 over the weights in a folder, a GGUF file or the hub's cache; None where there are
    none.

    Of safetensors: names and shapes of all tensors and evenly spread values, as float32. It does
    not depend on how tensors are spread over files, nor on which of 16 and 32 bits hold the same
    numbers. Some 10 MB of an 8B model are read. Of a GGUF file: its size and evenly spread blocks.

    Raises:
        UserError: a file that is not what its name says.
    """
    if (file := gguf_file(path)) is not None:
        return _hash_file(file) if file.is_file() else None
    files = _weight_files(path, revision)
    if not files:
        return None
    found: dict[str, bytes] = {}
    for file in files:
        try:
            found |= _tensors(file)
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise UserError(f"{file}: cannot read weights: {error}") from error
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\n".encode() + found[name])
    return digest.hexdigest()


def _weight_files(path: str, revision: str | None) -> list[Path]:
    """The safetensors files that transformers would read: one, else the parts in an index."""
    single = _find(path, "model.safetensors", revision)
    if single is not None:
        return [single]
    index = _find(path, "model.safetensors.index.json", revision)
    if index is None:
        return []
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    return [index.parent / name for name in names]


def _find(path: str, name: str, revision: str | None) -> Path | None:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:  # a path
        return None
    return Path(found) if isinstance(found, str) else None


def _tensors(file: Path) -> dict[str, bytes]:
    """Shape and sample of each tensor."""
    found = {}
    # Unbuffered reads: a mapped file, or a buffer, would read far more than is needed.
    with open(file, "rb", buffering=0) as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        if size > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = _spread(opened, 8 + size + begin, end - begin, _WIDTHS.get(entry["dtype"], 1))
            found[name] = f"{entry['shape']}".encode() + _as_float32(raw, entry["dtype"])
    return found


def _spread(file: RawIOBase, begin: int, count: int, width: int) -> bytes:
    """All ``count`` bytes from ``begin`` on, or those of evenly spread windows of values of
    ``width`` bytes, the first and the last included."""
    values, starts, length = count // width, [0], count
    if values > WINDOWS * WIDTH:
        length = WIDTH * width
        starts = [(values - WIDTH) * i // (WINDOWS - 1) * width for i in range(WINDOWS)]
    parts = []
    for start in starts:
        file.seek(begin + start)
        parts.append(file.read(length) or b"")
    raw = b"".join(parts)
    if len(raw) != length * len(starts):
        raise ValueError("it ends too early")
    return raw


def _as_float32(raw: bytes, dtype: str) -> bytes:
    if dtype == "BF16":  # the upper half of a float32
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
    """SHA-256 over the vocabulary, the token ids of a text that is hard to split, and the ids that
    begin and end a text."""
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"], ends]
    return _hash_json(facts)


def hash_template(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template; None without one."""
    return _hash_json(tokenizer.chat_template) if tokenizer.chat_template else None


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_identity(identity: Identity | None, folder: Path, **more: Any) -> None:
    """Write rlsloth.json into a folder: the identity, and ``more`` as further keys."""
    base = {} if identity is None else {"base": asdict(identity)}
    (folder / FILE).write_text(json.dumps(base | more, indent=2) + "\n", encoding="utf-8")


def read_identity(folder: Path) -> Identity | None:
    """The identity in a folder's rlsloth.json; None where there is none: others wrote the adapter.

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
        raise UserError(f"{file} is damaged ({error}); copy the adapter folder again") from error


def refuse_other_base(recorded: Identity, weights: str | None, adapter: Path, path: str) -> None:
    """Raises UserError unless ``path``, whose weights have this hash, is the recorded base."""
    if weights != recorded.weights:
        raise UserError(
            f"adapter {adapter} was trained on {recorded.path}, whose weights differ from "
            f"those of {path}: pass the base that it was trained on"
        )
