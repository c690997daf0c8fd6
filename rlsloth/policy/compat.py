"""Changes to other libraries' behaviour, each with the versions it is for and the reason.

tests/policy/test_compat.py holds a test for each that fails once the library no longer needs it,
and checks the installed versions. Changes to vLLM are in rollout/vllm/start.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Change:
    """A change to a library, as the code below applies it."""

    library: str
    versions: str
    """Those that need it and were tested, as a version specifier."""
    reason: str


# --- GGUF files: parsed once ---------------------------------------------------------------------

GGUF_PARSED_OFTEN = Change(
    "transformers",
    ">=5.16,<5.20",
    "it parses a GGUF file for the configuration, twice for the tokenizer and twice for the "
    "weights, and makes the map of tensor names for every module: most of a small model's start",
)


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Make gguf return the file that it parsed last, while that file is unchanged on disk."""
    import gguf

    ours = {"GGUFReader": _reader, "get_tensor_name_map": _tensor_names}
    theirs = {name: getattr(gguf, name) for name in ours}
    vars(gguf).update(ours)
    try:
        yield
    finally:
        vars(gguf).update(theirs)


def forget_parsed_gguf() -> None:
    """Free the parsed file: half a gigabyte for a vocabulary of 128,000."""
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


# --- scikit-learn: not imported ------------------------------------------------------------------

SCIKIT_LEARN_IMPORTED = Change(
    "transformers",
    ">=5.16,<5.20",
    "its assisted decoding, which is not used here, imports scikit-learn for 1.6 s",
)


@contextmanager
def without_scikit_learn() -> Iterator[None]:
    """Hide scikit-learn from transformers while its modules are imported."""
    from transformers import utils

    utils.is_sklearn_available = lambda: False
    try:
        yield
    finally:
        utils.is_sklearn_available = utils.import_utils.is_sklearn_available


# --- bitsandbytes: NF4 weights stay as they are on a CPU -----------------------------------------

NF4_REWRITTEN_ON_CPU = Change(
    "bitsandbytes",
    ">=0.50,<0.51",
    "on a CPU with bf16 instructions the first evaluation rewrites NF4 weights for bf16 products, "
    "and training would go on with those",
)


def keep_nf4_weights(module: Any) -> None:
    """Stop a linear of bitsandbytes from rewriting its weights; other modules are left alone."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


# --- decoders: hidden states before the final norm -----------------------------------------------

HIDDEN_STATES_NORMED = Change(
    "transformers",
    ">=5.16,<5.20",
    "a decoder returns its last hidden states only after its final norm, which linear_logprob "
    "applies to the scored rows itself",
)


@contextmanager
def norm_skipped(norm: nn.Module) -> Iterator[None]:
    """Make a final norm return its input."""
    forward = norm.forward
    norm.forward = _identity
    try:
        yield
    finally:
        norm.forward = forward


def _identity(x: Tensor) -> Tensor:
    return x


# --- PEFT: dense MLPs next to experts ------------------------------------------------------------

DENSE_MLPS_TAKEN_FOR_EXPERTS = Change(
    "peft",
    ">=0.21,<0.22",
    "in models with experts it takes the module names of dense MLPs for the experts; by the names "
    "of their weights it finds them, but adds B A to the weight, and in bf16 that sum loses small "
    "updates",
)


def adapt_dense_mlps(model: Any, config: Any, adapter: str) -> list[str]:
    """Adapt the linears whose weights are among ``config.target_parameters`` as modules.

    A container without a configuration makes PEFT take the module names as they are. The names of
    the weights are removed from ``config``, which PEFT then applies to the rest.

    Returns:
        The names removed, to be put back into the configuration once the adapters are in place, so
        that they are saved with them.
    """
    import peft

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # Their names before another adapter wrapped them.
    weights = [f".{name.removesuffix('.base_layer')}.weight" for name in linears]
    wanted = sorted(getattr(config, "target_parameters", None) or ())
    dense = [p for p in wanted if any(weight.endswith(f".{p}") for weight in weights)]
    if not dense:
        return []
    config.target_parameters = [p for p in wanted if p not in dense] or None
    inner = copy.copy(config)
    inner.target_modules = {p.removesuffix(".weight") for p in dense}
    inner.target_parameters, inner.rank_pattern, inner.alpha_pattern = None, {}, {}
    peft.inject_adapter_in_model(inner, nn.ModuleList([model]), adapter)
    return dense


CHANGES = (
    GGUF_PARSED_OFTEN,
    SCIKIT_LEARN_IMPORTED,
    NF4_REWRITTEN_ON_CPU,
    HIDDEN_STATES_NORMED,
    DENSE_MLPS_TAKEN_FOR_EXPERTS,
)
"""All of them."""
