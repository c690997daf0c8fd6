"""GGUF files of models: recognising them, and reading them once and without output."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from rlsloth.policy.compat import gguf_parsed_once


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
