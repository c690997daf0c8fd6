"""Libraries that take seconds to import, imported while something else is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rlsloth.config import RolloutConfig


@contextmanager
def beside(load: Callable[[], None]) -> Iterator[None]:
    """Run ``load`` in a thread meanwhile. Bad input, which raises here, does not wait for it."""

    def run() -> None:
        with suppress(Exception):  # it comes again where they are imported in earnest
            load()

    thread = threading.Thread(target=run, name="imports")
    thread.start()
    yield
    thread.join()


def import_transformers() -> None:
    """What loading a model needs."""
    import transformers.utils

    # Its assisted decoding, of which there is none here, would import scikit-learn for 1.6 s.
    found = transformers.utils.is_sklearn_available
    transformers.utils.is_sklearn_available = lambda: False
    try:
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    finally:
        transformers.utils.is_sklearn_available = found


def import_sampler(cfg: RolloutConfig) -> None:
    """vLLM, where it may sample."""
    from rlsloth.rollout.vllm_start import check_installed, import_vllm

    if cfg.engine != "transformers":
        check_installed()
        import_vllm(cfg.kv_cache)
