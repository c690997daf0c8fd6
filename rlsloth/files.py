"""Files and folders that a crash leaves old or new, never half written; JSON, hashes, caches.

Hidden siblings of the file or folder ``x`` while it is written:

    .x.tmp             the new file
    .x.partial-<hex>   the new folder; locked by its writer, so that the next one recognises what a
                       killed process left
    .x.replaced        the old folder, where two renames must swap them (exchange.py)

A write that fails raises a WriteError, which names the file and the number of bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlsloth.errors import naming_writes
from rlsloth.exchange import exchange


def _bytes_in(path: Path) -> int:
    """Bytes of a file, or of all files in a folder, as far as they can be counted."""
    with contextlib.suppress(OSError):
        return sum(file.lstat().st_size for file in [path, *path.rglob("*")] if not file.is_dir())
    return 0


# --- whole files and folders ---------------------------------------------------------------------


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all; it is on disk when this returns.

    Raises:
        WriteError: the file system refuses; an old file, if any, is untouched.
    """
    encoded = data.encode() if isinstance(data, str) else data
    with (
        naming_writes(path, lambda: len(encoded), _temporary(path)),
        replacing_file(path) as temporary,
        open(temporary, "wb") as file,
    ):
        file.write(encoded)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a hidden file next to ``path`` to write to, which takes its place at the end.

    After an exception the hidden file is removed and ``path`` is as it was. One that a killed
    process left is overwritten.

    Raises:
        WriteError: the file system refuses.
    """
    temporary = _temporary(path)
    written = 0
    with naming_writes(path, lambda: written, temporary):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            written = _bytes_in(temporary)
            with contextlib.suppress(OSError):  # the reason is the first failure
                temporary.unlink(missing_ok=True)
            raise
        written = _bytes_in(path)
        sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder next to ``path`` to write to, which takes its place at the end.

    After an exception the hidden folder is removed and ``path`` is as it was. What killed processes
    left next to ``path`` is removed first, or put back where it is the only copy.

    Raises:
        WriteError: the file system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary, lock = _locked_folder(path)
    try:
        with naming_writes(path, lambda: _bytes_in(temporary), temporary):
            yield temporary
            readable = temporary.stat().st_mode & 0o666
            for file in [p for p in temporary.rglob("*") if p.is_file()]:
                file.chmod(readable)  # safetensors writes for the owner alone
                _sync(file)
            sync_folder(temporary)
            _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _swap(new: Path, path: Path) -> None:
    old = _replaced(path)
    if not (path.exists() and exchange(new, path)):
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # after an exchange, the caller removes ``new``


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder.

    Partial folders without a writer go; a replaced folder comes back where it has no successor.
    Without ``name`` this is for all files and folders in a folder that this process has locked, so
    temporary files go, too.
    """
    known = "*" if name is None else glob.escape(name)
    for old in folder.glob(f".{known}.replaced"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(".replaced"))
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)
    for partial in folder.glob(f".{known}.partial-*"):
        with contextlib.suppress(OSError):  # in use, without locks, or already gone
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(lock)
    for path in folder.glob(".*.tmp") if name is None else ():
        with contextlib.suppress(OSError):
            path.unlink()


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Make an empty partial folder, and lock it so that no other process sweeps it."""
    while True:
        folder = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # swept before it was opened: once more
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks is not swept, either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk; its name is durable after ``sync_folder``.

    Raises:
        WriteError: the file system refuses.
    """
    with naming_writes(path, lambda: len(data)):
        with open(path, "wb") as file:
            file.write(data)
        _sync(path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- JSON ----------------------------------------------------------------------------------------


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON atomically; NaN and infinities become null, paths text."""
    text = json.dumps(finite(value), indent=2, default=str, allow_nan=False)
    write_atomically(path, text + "\n")


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None, in nested mappings and sequences too."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping by dotted key: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(name: str) -> Path | None:
    """Path of a folder in the user's cache folder; it may not exist. None without a home folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "rlsloth" / name
    except RuntimeError:  # the user has no home folder
        return None
