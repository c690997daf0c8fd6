"""Changes to other libraries' behaviour, each with its reason and the versions that need it.

tests/policy/test_compat.py has a test for each change that fails once the library no longer needs
it, and checks the installed versions. Changes to vLLM are in rollout/vllm/compat.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Change:
    """The record of a change to a library; the code after it applies the change."""

    library: str
    """The library's name on PyPI."""
    versions: str
    """Version specifier of the releases that need the change and were tested with it."""
    reason: str
    """The library's behaviour without the change."""


# --- GGUF files: parsed once ---------------------------------------------------------------------

GGUF_PARSED_OFTEN = Change(
    "transformers",
    ">=5.16,<5.20",
    "it parses a GGUF file for the configuration, twice for the tokenizer and twice for the "
    "weights, and builds the map of tensor names for every module; this takes most of the time in "
    "which a small model starts",
)


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Let gguf return the file that it parsed last, as long as that file is unchanged on disk."""
    import gguf

    ours = {"GGUFReader": _reader, "get_tensor_name_map": _tensor_names}
    theirs = {name: getattr(gguf, name) for name in ours}
    vars(gguf).update(ours)
    try:
        yield
    finally:
        vars(gguf).update(theirs)


def forget_parsed_gguf() -> None:
    """Free the parsed file, which takes half a gigabyte for a vocabulary of 128,000 tokens."""
    _parsed.cache_clear()


def _reader(path: str | Path) -> Any:
    file = Path(path).resolve()
    found = file.stat()
    return _parsed(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1)
def _parsed(file: Path, _changed: int, _size: int) -> Any:
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
    "its assisted decoding, which is not used here, imports scikit-learn, which takes 1.6 s",
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
    "and training would continue with the rewritten weights",
)


def keep_nf4_weights(module: Any) -> None:
    """Stop a linear layer of bitsandbytes from rewriting its weights; ignore other modules."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


def dequantise_to(module: Any, dtype: torch.dtype) -> None:
    """Let a linear layer of bitsandbytes compute in a type; ignore other modules.

    A 4-bit checkpoint names the type that it was made from, such as bf16, also on a CPU.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None:
        state.dtype = module.compute_dtype = dtype


# --- bitsandbytes: weights are quantised on the GPU ----------------------------------------------

NF4_QUANTISED_WHERE_LOADED = Change(
    "bitsandbytes",
    ">=0.50,<0.51",
    "weights that are loaded to the CPU are quantised there, which takes minutes for a model of "
    "billions of weights, and 16 times the memory of the largest one",
)


@contextmanager
def quantised_on(device: torch.device) -> Iterator[None]:
    """Let bitsandbytes quantise on a device what it then puts anywhere else."""
    from bitsandbytes.nn import Params4bit

    theirs = Params4bit._quantize

    def quantise(self: Any, place: Any) -> Any:
        made = theirs(self, device)
        made.data = made.data.to(place)
        made.quant_state.to(place)
        return made

    Params4bit._quantize = quantise
    try:
        yield
    finally:
        Params4bit._quantize = theirs


# --- decoders: hidden states before the final norm -----------------------------------------------

HIDDEN_STATES_NORMED = Change(
    "transformers",
    ">=5.16,<5.20",
    "a decoder returns its last hidden states only after its final norm, but linear_logprob "
    "applies that norm itself, to the scored rows alone",
)


@contextmanager
def norm_skipped(norm: nn.Module) -> Iterator[None]:
    """Make a final norm return its input unchanged."""
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
    "in models with experts it reads the module names of dense MLPs as names of experts; given the "
    "names of their weights it adapts the right ones, but by adding B A to the weight, and in bf16 "
    "that sum loses small updates",
)


def adapt_dense_mlps(model: Any, config: Any, adapter: str) -> list[str]:
    """Adapt linear layers as modules if their weights are named in ``config.target_parameters``.

    The names of those weights are removed from ``config``, so that PEFT does not adapt them again.

    Args:
        model: transformers' model, changed in place.
        config: PEFT's LoraConfig, changed in place.
        adapter: the adapter's name.

    Returns:
        The removed names. The caller puts them back into the configuration once all adapters are in
        place, so that they are saved with it.
    """
    import peft

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The names that the weights had before another adapter wrapped their modules.
    weights = [f".{name.removesuffix('.base_layer')}.weight" for name in linears]
    wanted = sorted(getattr(config, "target_parameters", None) or ())
    dense = [p for p in wanted if any(weight.endswith(f".{p}") for weight in weights)]
    if not dense:
        return []
    config.target_parameters = [p for p in wanted if p not in dense] or None
    inner = copy.copy(config)
    inner.target_modules = {p.removesuffix(".weight") for p in dense}
    inner.target_parameters, inner.rank_pattern, inner.alpha_pattern = None, {}, {}
    # Inside a container that has no transformers configuration, PEFT does not know of experts and
    # uses module names as they are.
    peft.inject_adapter_in_model(inner, nn.ModuleList([model]), adapter)
    return dense


CHANGES = (
    GGUF_PARSED_OFTEN,
    SCIKIT_LEARN_IMPORTED,
    NF4_REWRITTEN_ON_CPU,
    NF4_QUANTISED_WHERE_LOADED,
    HIDDEN_STATES_NORMED,
    DENSE_MLPS_TAKEN_FOR_EXPERTS,
)
"""All changes in this file."""
