"""Cache on disk of tokenised examples: a file for each content of rows, tokenizer and options.

A file has the tokens of all examples, and the findings of the reading. It is read whole or not at
all: a damaged or foreign one is made again. Files hold the user's data, so that only the user can
read their folder; the least recently used ones are removed beyond LIMIT_BYTES.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsloth.config.data import ExamplesConfig
from rlsloth.data.example import Example
from rlsloth.data.reading import MANY, Reading
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import Row
from rlsloth.data.token_key import key_of
from rlsloth.errors import first_line
from rlsloth.files import cache_folder, replacing_file, sweep

LIMIT_BYTES = 4 * 2**30
"""Largest size of all files together."""
_SUFFIX = ".safetensors"

Arrays = Mapping[str, NDArray[Any]]


def through_cache(
    make: Callable[[], list[Example]],
    rows: Sequence[Row],
    cfg: ExamplesConfig,
    renderer: Renderer,
    source: str,
    reading: Reading,
    reader: Callable[..., Any],
) -> list[Example]:
    """Read the examples of rows from the cache; make them and keep them if they are not there.

    Args:
        make: makes the examples with the other arguments.
        rows: the rows, as read from the dataset.
        cfg: the section ``data``.
        renderer: renders conversations to tokens.
        source: name of the dataset, which messages about rows contain.
        reading: its findings are restored, too.
        reader: function that makes examples of rows.
    """
    folder = _private_folder() if cfg.cache and len(rows) >= MANY else None
    if folder is None:
        return make()
    key = key_of(rows, cfg, renderer, source, reading, reader)
    if key is None:
        return make()
    path = folder / f"{key}{_SUFFIX}"
    if (found := _load(path, key, reading)) is not None:
        print(f"tokenised examples read from the cache ({path})", flush=True)
        return found
    made = make()
    if made:
        _keep(path, key, made, reading)
    return made


def _private_folder() -> Path | None:
    """Make the folder, for the user alone; None if that is impossible."""
    folder = cache_folder("examples")
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return None
        folder.chmod(0o700)
    except OSError:
        return None
    return folder


def _load(path: Path, key: str, reading: Reading) -> list[Example] | None:
    """Examples of a file, whose findings go to ``reading``; None if it is absent or damaged."""
    if not path.is_file():
        return None
    try:
        facts, arrays = _read(path)
        if facts["digest"] != _digest(key, facts["reading"], arrays):
            return None
        state, found = json.loads(facts["reading"]), _examples(arrays)
    except Exception:  # of safetensors, or of a file that something else has written
        return None
    reading.restore(state)
    with contextlib.suppress(OSError):
        os.utime(path)  # used now: removed later than others
    return found


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    from safetensors import safe_open

    opened: Any = safe_open(path, framework="numpy")
    with opened as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _keep(path: Path, key: str, examples: Sequence[Example], reading: Reading) -> None:
    """Write a file, for which older ones make room; a failure is one line, since nothing is lost.

    Nothing is written while another process writes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = _arrays(examples)
    state = json.dumps(reading.state())
    facts = {"reading": state, "digest": _digest(key, state, arrays)}
    size = sum(array.nbytes for array in arrays.values()) + len(state)
    if size > LIMIT_BYTES:
        return
    try:
        with _locked(path.parent) as free:
            if not free:
                return
            _make_room(path.parent, size)
            with replacing_file(path) as temporary:
                save_file(arrays, temporary, facts)
    except (OSError, SafetensorError) as error:
        print(f"tokenised examples are not kept in the cache: {first_line(error)}", flush=True)
        return
    print(
        f"tokenised examples are kept in the cache for the next start ({path}; --data.cache false "
        "switches this off)",
        flush=True,
    )


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder for the body; False if another process has locked it."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(lock)


def _make_room(folder: Path, size: int) -> None:
    """Remove what killed writers left, and the least recently used files beyond the limit."""
    sweep(folder)
    files = [(file, file.stat()) for file in folder.glob(f"*{_SUFFIX}")]
    total = sum(found.st_size for _, found in files)
    for file, found in sorted(files, key=lambda pair: pair[1].st_mtime):
        if total + size <= LIMIT_BYTES:
            return
        file.unlink()
        total -= found.st_size


# --- examples as arrays --------------------------------------------------------------------------


def _arrays(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """The examples' values, joined: token ids of each prompt and its answers, then the next."""
    answers = [answer for example in examples for answer in example.answers]
    ids = [part for e in examples for part in (e.prompt_ids, *(ids for ids, _ in e.answers))]
    masks = [mask for _, mask in answers]
    questions = b"".join(bytes.fromhex(example.question) for example in examples)
    return {
        "index": np.array([example.index for example in examples], np.int64),
        "question": np.frombuffer(questions, np.uint8),
        "label": np.array([example.label for example in examples], np.bool_),
        "answers": np.array([len(example.answers) for example in examples], np.int64),
        "lengths": np.array([len(part) for part in ids], np.int64),
        "ids": np.concatenate(ids),
        "masks": np.packbits(np.concatenate(masks)),
    }


def _examples(arrays: Arrays) -> list[Example]:
    """The examples of ``_arrays``. Their arrays are parts of the joined ones."""
    lengths = iter(arrays["lengths"].tolist())
    ids = arrays["ids"]
    masks = np.unpackbits(arrays["masks"]).astype(np.bool_)
    questions = arrays["question"].tobytes().hex()
    found, at, mask_at = [], 0, 0
    facts = zip(*(arrays[name].tolist() for name in ("index", "label", "answers")), strict=True)
    for number, (index, label, count) in enumerate(facts):
        prompt = ids[at : (at := at + next(lengths))]
        answers = []
        for _ in range(count):
            length = next(lengths)
            mask = masks[mask_at : (mask_at := mask_at + length)]
            answers.append((ids[at : (at := at + length)], mask))
        question = questions[64 * number : 64 * (number + 1)]
        found.append(Example(index, question, prompt, tuple(answers), label))
    return found


def _digest(key: str, state: str, arrays: Arrays) -> str:
    """Hash a file's content together with its key."""
    digest = hashlib.sha256(f"{key}\n{state}\n".encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
