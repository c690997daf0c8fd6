"""Memory of a call from Python: given back when the call ends, however it ends."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def freeing_memory(folder: Path | None = None) -> Iterator[None]:
    """Free what the calls within held, so that a notebook can start the next run.

    An exception keeps the local variables of every function that it passed through, and a notebook
    keeps the exception: the variables are cleared, the model with them.

    Args:
        folder: the run folder; after an interrupt, a note on the exception says how to continue.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            name = "the folder named in the first line" if folder is None else repr(str(folder))
            error.add_note(
                "to continue from the last checkpoint, make the same call with "
                f"run=RunConfig(dir=..., resume=True); dir: {name}"
            )
        _clear(error, set())
        raise
    finally:
        gc.unfreeze()  # what training and vLLM have frozen (training/session.py)
        gc.collect()  # a model is full of circles
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _clear(error: BaseException | None, seen: set[int]) -> None:
    """Clear the frames of an exception and of those that led to it."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    traceback.clear_frames(error.__traceback__)
    _clear(error.__cause__, seen)
    _clear(error.__context__, seen)
