"""Libraries that take seconds to import, imported while something else is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rlsloth.config import ModelConfig, RolloutConfig
from rlsloth.policy.compat import without_scikit_learn
from rlsloth.policy.load import pick_device
from rlsloth.rollout.engines import choose_engine


@contextmanager
def in_parallel(*loads: Callable[[], None]) -> Iterator[None]:
    """Run ``loads`` in a thread while the body runs. An exception of the body is raised at once and
    starts no further load."""
    refused = threading.Event()

    def run() -> None:
        for load in loads:
            with suppress(Exception):  # it is raised again by the import that needs the library
                if not refused.is_set():
                    load()

    thread = threading.Thread(target=run, name="imports")
    thread.start()
    try:
        yield
    except BaseException:
        refused.set()
        raise
    thread.join()  # two threads in one library's import find each other's modules half made


def import_transformers() -> None:
    """Import what loading a model needs."""
    with without_scikit_learn():
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def import_sampler(model: ModelConfig, rollout: RolloutConfig) -> None:
    """Import what the run's rollout engine needs."""
    device = pick_device(model.device)
    choose_engine(rollout, device.type).kind.preload(device, rollout)
