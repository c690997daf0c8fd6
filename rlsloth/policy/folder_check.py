"""Checks of a model's folder before any library reads it: its files may come from anyone.

They keep paths inside the folder, nothing unpickled, no code downloaded, and sizes in proportion to
the files. Whatever passes and still makes a library fail is caught in files.py.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError, first_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
MOST_LAYERS = 2000
"""Most layers of a model; the deepest published ones have a few hundred."""
MOST_TEXT = 64 * 2**20
"""Most bytes of a JSON file, and of the header of a safetensors file."""
LARGEST_SIZE = 2**31
"""Largest number of a configuration's key whose name ends in one of _SIZES."""
UNUSED_SIZE = 2**16
"""Such a number that passes even if no tensor is as large."""
LONGEST_LIST = 100_000
"""Most entries of a list in a configuration."""
_LAYERS = re.compile(r"(^|_)(n_)?layers?$")
_SIZES = ("size", "heads", "experts", "dim", "embd", "head", "rank")
_IMPLEMENTATIONS = re.compile(r"^_*(attn|experts)_implementation(_internal)?$")
_DAMAGE = (ValueError, TypeError, AttributeError, struct.error, RecursionError)
"""Exceptions that a damaged header raises, besides those of missing keys."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The size of a model's weight files."""

    tensors: int
    """Number of tensors."""
    bytes: int
    """Number of bytes of all files."""
    widest: int
    """Largest dimension of a tensor."""


def check_folder(folder: Path) -> None:
    """Check the configuration and the weight files of a model's folder.

    A folder without weights passes: a memory plan needs none.

    Raises:
        UserError: a file is damaged, names files outside the folder or code to download, or gives
            sizes that its weights cannot have; or the folder contains an adapter.
    """
    refuse_adapter(folder)
    weights = stored_weights(folder)
    file = folder / CONFIG
    if file.is_file():
        check_config(read_json(file), file, weights)
    names = folder / "tokenizer_config.json"
    if names.is_file():
        for name in read_json(names).get("fast_tokenizer_files") or ():
            _inside(name, names, ".json")


def refuse_adapter(folder: Path) -> None:
    """Raise UserError for the folder of an adapter, alone or together with a model.

    transformers would load the base model that adapter_config.json names, instead of the folder's.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return
    base = read_json(file).get("base_model_name_or_path")
    named = f"--model.path {base} --model.adapter {folder}"
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise UserError(f"{folder} is the folder of an adapter, not of a model; pass {named}")
    raise UserError(
        f"{folder} contains a model and an adapter ({ADAPTER_CONFIG}); for the adapter "
        f"pass {named}, for the model alone remove {ADAPTER_CONFIG} from the folder"
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Raises:
        UserError: the file is too large, or has something else in it.
    """
    try:
        if (size := file.stat().st_size) > MOST_TEXT:
            raise ValueError(f"{size} bytes are too many")
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be read ({first_line(error, 100)}); download or copy it again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{file} contains {type(value).__name__}, not a JSON object; copy it again")
    return value


# --- configuration -------------------------------------------------------------------------------


def check_config(config: dict[str, Any], file: Path | str, weights: StoredWeights | None) -> None:
    """Check the values of a configuration that a library would act upon without a check.

    Args:
        config: content of config.json.
        file: its path, for messages.
        weights: the model's weight files; None if they are not known.

    Raises:
        UserError: a size is absurd, or code would be downloaded.
    """
    for key, value in _entries(config, file):
        if isinstance(value, (str, dict)) and _IMPLEMENTATIONS.match(key):
            _refuse_code(key, value, file)
        if isinstance(value, int) and value > (most := _most(key, weights)):
            raise UserError(
                f"{file}: {key} is {value}, more than the {most} that this model may have; copy "
                "the file again"
            )
    stored = config.get("quantization_config")
    if stored is not None and not isinstance(stored, dict):
        raise UserError(f"{file}: quantization_config is {stored!r}, not an object")
    if weights is not None:
        _check_sizes(config, file, weights)


def _most(key: str, weights: StoredWeights | None) -> float:
    """Return the largest number that a configuration's key may have."""
    if _LAYERS.search(key):
        return MOST_LAYERS
    if not key.endswith(_SIZES):
        return math.inf
    # A size that is not used may be larger than every tensor.
    return LARGEST_SIZE if weights is None else max(4 * weights.widest, UNUSED_SIZE)


def _entries(config: dict[str, Any], file: Path | str) -> Iterator[tuple[str, Any]]:
    """Yield all keys with their values, in nested objects and lists too."""
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if len(value) > LONGEST_LIST:
            raise UserError(f"{file} has a list of {len(value)} entries; copy the file again")
        if isinstance(value, dict):
            yield from value.items()
            value = value.values()
        left += [item for item in value if isinstance(item, (dict, list))]


def _refuse_code(key: str, value: str | dict[str, Any], file: Path | str) -> None:
    """Refuse the name of a hub repository, from which transformers would download code."""
    names = value.values() if isinstance(value, dict) else [value]
    for name in names:
        if isinstance(name, str) and "/" in name:
            raise UserError(
                f"{file}: {key} is {name!r}, which names code to download and run; remove the key "
                "(rlsloth has its own attention)"
            )


def _check_sizes(config: dict[str, Any], file: Path | str, weights: StoredWeights) -> None:
    """Refuse sizes of the text model that its weight files are too small for."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    layers = text.get("num_hidden_layers")
    if isinstance(layers, int) and layers > weights.tensors:
        raise UserError(
            f"{file}: num_hidden_layers is {layers}, but the weights have only {weights.tensors} "
            "tensors; copy the model again"
        )
    rows, hidden = text.get("vocab_size"), text.get("hidden_size")
    if isinstance(rows, int) and isinstance(hidden, int) and rows * hidden > 8 * weights.bytes:
        raise UserError(
            f"{file}: vocab_size {rows} times hidden_size {hidden} is more than the "
            f"{weights.bytes} bytes of weights can hold; copy the model again"
        )


# --- weights -------------------------------------------------------------------------------------


def stored_weights(folder: Path) -> StoredWeights | None:
    """Read the headers of a folder's weight files; None if the folder has no weights.

    Raises:
        UserError: a file is damaged or incomplete, an index names a file that is not a safetensors
            file inside the folder, or the weights are pickled.
    """
    files = weight_files(folder)
    if not files:
        _refuse_pickled(folder)
        return None
    headers = [read_header(file) for file in files]
    sizes = [n for header in headers for entry in header.values() for n in entry["shape"]]
    size = sum(file.stat().st_size for file in files)
    return StoredWeights(sum(map(len, headers)), size, max(sizes, default=0))


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that transformers would read: a single one, or those of an index.

    Empty if there are none.

    Raises:
        UserError: the index names a file that is not a safetensors file inside the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return []
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index} has no weight_map; download the model again")
    files = []
    for name in sorted({str(place) for place in places.values()}):
        files.append(folder / _inside(name, index, ".safetensors"))
        if not files[-1].is_file():
            raise UserError(f"{index} names {name}, which is missing; download the model again")
    return files


def _inside(name: Any, file: Path, suffix: str) -> str:
    """Return a file's name if it is one in the same folder, with this suffix."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name:
        raise UserError(f"{file} names {name!r}, which is not a file in its folder; not read")
    if not name.endswith(suffix):
        raise UserError(f"{file} names {name!r}, which is not a {suffix} file; not read")
    return name


def read_header(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: tensor's name -> its dtype, shape and data_offsets.

    Raises:
        UserError: the file is damaged or incomplete.
    """
    try:
        # Unbuffered, because a buffer would read more than is needed.
        with open(file, "rb", buffering=0) as opened:
            size = file.stat().st_size
            (length,) = struct.unpack("<Q", opened.read(8) or b"")
            if length > min(size - 8, MOST_TEXT):
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length) or b"")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"it ends before tensor {name}, so it is incomplete")
            if not all(isinstance(n, int) for n in entry["shape"]):
                raise ValueError(f"tensor {name} has the shape {entry['shape']}")
    except (OSError, LookupError, *_DAMAGE) as error:
        raise UserError(
            f"{file}: cannot read weights: {first_line(error)}; download or copy the file again"
        ) from error
    found: dict[str, Any] = header
    return found


def _refuse_pickled(folder: Path) -> None:
    """Raise UserError for a folder whose only weights are in another format."""
    for pattern in _PICKLED:
        for file in sorted(folder.glob(pattern)):
            if file.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
                raise UserError(
                    f"{folder} has no {WEIGHTS}, only {file.name}, a pickled file, which could run "
                    "code when it is read; save the model again as safetensors (save_pretrained), "
                    "or pass another revision of it"
                )
    for file in sorted(folder.glob("*.gguf")):
        raise UserError(f"{folder} has no {WEIGHTS}; pass its GGUF file: --model.path {file}")
