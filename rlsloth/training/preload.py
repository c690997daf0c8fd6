"""Imports of libraries that take seconds, in parallel with other work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rlsloth.config import ModelConfig, RolloutConfig
from rlsloth.policy.compat import without_scikit_learn
from rlsloth.policy.device import pick_device
from rlsloth.policy.load import quiet_libraries
from rlsloth.rollout.engine import EngineKind

THREAD = "imports"
"""Name of the thread that imports."""


@contextmanager
def in_parallel(*loads: Callable[[], None]) -> Iterator[None]:
    """Run ``loads`` in a thread while the body runs.

    An exception of the body is raised at once and starts no further load; the load that has begun
    goes on, and ``finish_imports`` waits for it.
    """
    finish_imports()
    refused = threading.Event()

    def run() -> None:
        for load in loads:
            with suppress(Exception):  # it is raised again by the import that needs the library
                if not refused.is_set():
                    load()

    thread = threading.Thread(target=run, name=THREAD)
    thread.start()
    try:
        yield
    except BaseException:
        refused.set()
        raise
    thread.join()  # a module that two threads import is only half initialised for one of them


def finish_imports() -> None:
    """Wait for imports that a refused run has left running.

    They change sys.modules and logging's table of loggers, which other code may be reading.
    """
    for thread in threading.enumerate():
        if thread.name == THREAD and thread is not threading.current_thread():
            thread.join()


def import_transformers() -> None:
    """Import the libraries that loading a model needs."""
    quiet_libraries()  # before peft imports bitsandbytes, which logs a notice at once
    with without_scikit_learn():
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def import_sampler(kind: EngineKind, model: ModelConfig, rollout: RolloutConfig) -> None:
    """Import the libraries that the run's rollout engine needs."""
    kind.preload(pick_device(model.device), rollout)
