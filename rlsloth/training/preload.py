"""Libraries that take seconds to import, imported while something else is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rlsloth.config import GrpoConfig
from rlsloth.policy.compat import without_scikit_learn
from rlsloth.policy.load import pick_device
from rlsloth.rollout.vllm.start import check_installed, import_vllm


@contextmanager
def beside(*loads: Callable[[], None]) -> Iterator[None]:
    """Run ``loads`` in a thread meanwhile. What is raised here is raised at once, and begins no
    further one; the command ends when the one under way does."""
    refused = threading.Event()

    def run() -> None:
        for load in loads:
            with suppress(Exception):  # it comes again where they are imported in earnest
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
    """What loading a model needs."""
    with without_scikit_learn():
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def import_sampler(cfg: GrpoConfig) -> None:
    """vLLM, where it may sample."""
    if cfg.rollout.engine != "transformers":
        check_installed()
        import_vllm(pick_device(cfg.model.device), cfg.rollout.kv_cache)
