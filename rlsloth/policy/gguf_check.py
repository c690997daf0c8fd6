"""Checks of a GGUF file before any library reads it, and of metadata that transformers drops."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError, first_line
from rlsloth.policy.folder_check import LARGEST_SIZE, MOST_LAYERS

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Type of a metadata value in the file -> its format in ``struct``."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_REDUNDANT = {
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "vocab_size",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}
"""Keys of an architecture that follow from other keys or from tensors, or are checked here."""
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata and the tensor table of a GGUF file."""

    values: Mapping[str, Any]
    """Key -> value; the number of entries for an array."""
    tensors: Mapping[str, int]
    """Name -> number of elements."""
    bytes: int
    """Size of the file."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's family."""
        return str(self.values.get("general.architecture", ""))


def check_gguf(file: Path, option: str = "--model.path") -> GgufHeader:
    """Check that a GGUF file is whole, of plausible size, and does not need what is not read.

    Args:
        file: the file.
        option: the command-line option that named it, for messages.

    Raises:
        UserError: the file is missing, damaged, or would be computed wrongly.
    """
    if not file.is_file():
        raise UserError(
            f"{option} {file}: there is no such file (current folder: {Path.cwd()}); check the path"
        )
    found = file.stat()
    header = _checked(file, option, found.st_mtime_ns, found.st_size)
    _refuse_unread(header, f"{option} {file}")
    return header


@lru_cache(maxsize=4)
def _checked(file: Path, option: str, _changed: int, _size: int) -> GgufHeader:
    try:
        header = read_header(file)
        _check_sizes(header)
    except (ValueError, OverflowError, struct.error, RecursionError, OSError) as error:
        raise UserError(
            f"{option} {file}: cannot read this GGUF file: {first_line(error)}; download it again"
        ) from None
    return header


def read_header(file: Path) -> GgufHeader:
    """Read metadata and tensor table; every length is checked against the file's size.

    Raises:
        ValueError: the file is damaged.
        struct.error: the file ends too early.
    """
    with open(file, "rb") as opened, _mapped(opened) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, keys = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; known: 2, 3")
        at, values, table = 24, {}, {}
        for _ in range(keys):
            name, at = _text(data, at)
            (kind,) = struct.unpack_from("<I", data, at)
            values[name], at = _value(data, at + 4, kind)
        for _ in range(tensors):
            name, at = _text(data, at)
            (dimensions,) = struct.unpack_from("<I", data, at)
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"tensor {name} has {dimensions} dimensions")
            shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
            at += 4 + 8 * dimensions
            _, offset = struct.unpack_from("<IQ", data, at)
            at += 12
            table[name] = math.prod(shape)
            # The coarsest types store more than one bit for each element.
            if offset > len(data) or table[name] > 8 * len(data):
                raise ValueError(f"it ends before tensor {name}, so it is incomplete")
        return GgufHeader(values, table, len(data))


def _mapped(opened: Any) -> mmap.mmap:
    try:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise ValueError("it is empty") from None


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    """Read a text; return it and the position after it."""
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise ValueError("a text is longer than the file")
    return data[at + 8 : end].decode("utf-8", "replace"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """Read a value; return it (the number of entries for an array) and the position after it."""
    if kind == _STRING:
        return _text(data, at)
    if kind in _SCALARS:
        (value,) = struct.unpack_from(f"<{_SCALARS[kind]}", data, at)
        return value, at + struct.calcsize(_SCALARS[kind])
    if kind != _ARRAY:
        raise ValueError(f"a value has the unknown type {kind}")
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner in _SCALARS:
        at += count * struct.calcsize(_SCALARS[inner])
    elif inner == _STRING and count <= len(data):
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8 + length
            if at > len(data):
                break
    else:
        raise ValueError(f"an array has {count} entries of type {inner}")
    if at > len(data):
        raise ValueError("an array is longer than the file")
    return count, at


def _check_sizes(header: GgufHeader) -> None:
    """Refuse sizes that the file is too small for."""
    if not header.architecture:
        raise ValueError("it has no general.architecture")
    if not header.tensors:
        raise ValueError("it has no tensors")
    prefix = f"{header.architecture}."
    for key, value in header.values.items():
        if key.startswith(prefix) and isinstance(value, int) and value > LARGEST_SIZE:
            raise ValueError(f"{key} is {value}")
    layers = header.values.get(f"{prefix}block_count", 0)
    most = min(MOST_LAYERS, len(header.tensors))
    if not isinstance(layers, int) or layers > most:
        raise ValueError(f"{prefix}block_count is {layers}, more than {most}")
    rows = header.values.get("tokenizer.ggml.tokens", 0)
    hidden = header.values.get(f"{prefix}embedding_length", 0)
    if isinstance(hidden, int) and rows * hidden > 8 * header.bytes:
        raise ValueError(f"{rows} tokens times {prefix}embedding_length {hidden} do not fit it")


# --- what transformers drops ---------------------------------------------------------------------


def _refuse_unread(header: GgufHeader, named: str) -> None:
    """Refuse scaled rotary positions, which transformers does not read from a GGUF file.

    Its reader would compute with unscaled ones, without a word.
    """
    arch, values = header.architecture, header.values
    remedy = "transformers does not read it from a GGUF file; pass the model's folder or hub id"
    for name in _ROPE_TENSORS:
        if name in header.tensors:
            raise UserError(f"{named} scales rotary positions (tensor {name}): {remedy}")
    kind = values.get(f"{arch}.rope.scaling.type", "none")
    factor = values.get(f"{arch}.rope.scaling.factor", 1.0)
    if kind != "none" and arch != "gpt-oss" and (kind != "linear" or factor != 1.0):
        key = f"{arch}.rope.scaling.type"
        raise UserError(f"{named} scales rotary positions ({key} {kind}): {remedy}")


def stored_type(header: GgufHeader) -> str:
    """Name the type of most weights if they have fewer than 16 bits, such as Q4_K_M, else nothing.

    A file says so itself, by llama.cpp's numbers; a number that the library gguf does not know is
    returned as it is.
    """
    from gguf import LlamaFileType

    number = header.values.get("general.file_type")
    whole = (LlamaFileType.ALL_F32, LlamaFileType.MOSTLY_F16, LlamaFileType.MOSTLY_BF16)
    if not isinstance(number, int) or number in whole:
        return ""
    known: dict[int, str] = {
        kind.value: kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType
    }
    return known.get(number, f"file type {number}")


def unread_keys(header: GgufHeader) -> list[str]:
    """List the keys of the model's architecture that transformers drops."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    arch = header.architecture
    known = {"gpt-oss": "gpt_oss"}.get(arch, arch)
    read = GGUF_CONFIG_MAPPING.get(known)
    if read is None:  # read by a function of transformers that takes what it knows
        return []
    prefix = f"{arch}."
    keys = (key.removeprefix(prefix) for key in header.values if key.startswith(prefix))
    return sorted(f"{prefix}{key}" for key in keys if key not in read and key not in _REDUNDANT)
