"""A GGUF file, parsed once.

transformers (5.16 - 5.19) parses the file anew for the configuration, twice for the tokenizer and
twice for the weights, a plan does so before a run, and the map of tensor names is made again for
every module: most of a small model's start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any


@contextmanager
def parsed_once(read: bool = True) -> Iterator[None]:
    """Within it, gguf gives the file that it read last out of memory while that is unchanged.
    Without ``read`` no such file is read, and gguf not imported."""
    if not read:
        yield
        return
    import gguf

    ours = {"GGUFReader": _reader, "get_tensor_name_map": _tensor_names}
    theirs = {name: getattr(gguf, name) for name in ours}
    vars(gguf).update(ours)
    try:
        yield
    finally:
        vars(gguf).update(theirs)


def forget() -> None:
    """Let go of the file: half a gigabyte for a vocabulary of 128,000."""
    _parsed.cache_clear()


def _reader(path: str | Path) -> Any:
    file = Path(path).resolve()
    found = file.stat()
    return _parsed(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1)
def _parsed(file: Path, changed: int, size: int) -> Any:
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(file)


@lru_cache
def _tensor_names(*args: Any) -> Any:
    from gguf.tensor_mapping import get_tensor_name_map

    return get_tensor_name_map(*args)
