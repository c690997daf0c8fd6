"""Model families that can be written as GGUF, and their hyperparameters under llama.cpp's keys.

The sources are llama.cpp's loaders (src/models/*.cpp) and its converter (convert_hf_to_gguf.py),
both from the source distribution of llama-cpp-python 0.3.36. A test compares the files written here
with those of that converter, key by key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlsloth.errors import UserError


@dataclass(frozen=True, slots=True)
class Family:
    """The form in which llama.cpp expects a family's weights, and what it has built in for it."""

    arch: str
    """The architecture's name in llama.cpp."""
    permuted: bool = False
    """Whether rotary positions rotate neighbouring dimensions (0, 1), (2, 3), …

    transformers rotates (0, d/2), (1, d/2 + 1), …, so the rows of the query and key projections are
    reordered.
    """
    norm_shift: float = 0.0
    """Number added to every norm's weight: transformers' Gemma multiplies by 1 + weight."""
    activation: str = "silu"
    """Name of the only activation function that llama.cpp runs for this family."""
    window_every: int = 0
    """One layer in this many attends to all tokens, the rest within the sliding window.

    llama.cpp has this pattern built in. 0: it has no sliding window for this family.
    """
    layers_27b: int = 0
    """Number of layers at which llama.cpp scales attention by hidden size / heads.

    At all other numbers it scales by the size of a head.
    """


FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma2": Family(
        "gemma2", norm_shift=1.0, activation="gelu_pytorch_tanh", window_every=2, layers_27b=46
    ),
    "gemma3_text": Family(
        "gemma3", norm_shift=1.0, activation="gelu_pytorch_tanh", window_every=6, layers_27b=62
    ),
}
"""Model type in transformers -> its family. Phi-4 has the type phi3, SmolLM2 the type llama."""


def read_config(folder: Path) -> Any:
    """Read the configuration of the model in ``folder``.

    Raises:
        UserError: there is no configuration, or the model cannot be written as GGUF.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json: pass a run, an adapter, or a whole model's folder"
        )
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{folder}: model type {config.model_type!r} cannot be written as GGUF (known: "
            f"{', '.join(sorted(FAMILIES))}); export with --to merged instead"
        )
    _check(folder, config, FAMILIES[config.model_type])
    return config


def family_of(config: Any) -> Family:
    """Return the family of a model that ``read_config`` accepted."""
    return FAMILIES[config.model_type]


def head_size(config: Any) -> int:
    """Return the number of dimensions of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _check(folder: Path, config: Any, family: Family) -> None:
    """Refuse a configuration that llama.cpp would run differently from transformers."""

    def refuse(fact: str) -> NoReturn:
        raise UserError(
            f"{folder} cannot be written as GGUF: {fact}; export with --to merged instead"
        )

    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        refuse(
            f"llama.cpp runs {family.arch} with activation {family.activation}, the model has "
            f"{activation}"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{folder}: its weights are quantised (quantization_config in config.json), but GGUF "
            "files are written from 16-bit weights; pass a folder with those"
        )
    _check_attention(config, family, refuse)
    _check_rope(config, family, refuse)


def _check_attention(config: Any, family: Family, refuse: Callable[[str], NoReturn]) -> None:
    if family.window_every:
        full = [(i + 1) % family.window_every == 0 for i in range(config.num_hidden_layers)]
        if [kind == "full_attention" for kind in config.layer_types] != full:
            refuse(
                f"llama.cpp expects 1 in {family.window_every} layers of {family.arch} to attend "
                "to all tokens, and layer_types differs"
            )
        scale = head_size(config)
        if config.num_hidden_layers == family.layers_27b:
            scale = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != scale:
            refuse(
                f"llama.cpp scales the attention of {family.arch} by {scale}, the model by "
                f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
            )
    if family.arch == "phi3" and head_size(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        refuse(
            f"llama.cpp expects the heads of phi3 to add up to hidden_size {config.hidden_size}, "
            f"the model has {config.num_attention_heads} of size {head_size(config)}"
        )


def _check_rope(config: Any, family: Family, refuse: Callable[[str], NoReturn]) -> None:
    rope = full_rope(config)
    allowed = {"default", "llama3", "linear", "yarn"}
    if family.arch == "phi3":
        allowed = {"default", "longrope"}
    if rope["rope_type"] not in allowed or (
        family.arch != "llama" and rope["rope_type"] == "llama3"
    ):
        refuse(f"llama.cpp does not run {family.arch} with rope_type {rope['rope_type']!r}")
    if family.arch != "phi3" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(
            f"llama.cpp does not run {family.arch} with partial_rotary_factor "
            f"{rope['partial_rotary_factor']}"
        )


def full_rope(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of the layers that attend to all tokens.

    Layers with a sliding window may have parameters of their own.
    """
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def context_length(config: Any) -> int:
    """Return the longest context, in tokens, in which llama.cpp and transformers agree.

    That is the sliding window if the model has one and llama.cpp does not apply it.
    """
    limit = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and "sliding_attention" in kinds and not family_of(config).window_every:
        return min(limit, int(window))
    return limit


def add_hyperparameters(writer: Any, config: Any) -> None:
    """Write all metadata keys that llama.cpp needs except the vocabulary's.

    Args:
        writer: a gguf.GGUFWriter.
        config: the model's configuration (``read_config``).
    """
    family = family_of(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family.arch != "phi3" and getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    _add_rope(writer, config, family)
    if family.window_every:
        writer.add_sliding_window(config.sliding_window)
    elif family.arch == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_rope(writer: Any, config: Any, family: Family) -> None:
    from gguf import RopeScalingType

    rope = full_rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    local = config.rope_parameters.get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if family.arch == "llama":
        writer.add_rope_dimension_count(head_size(config))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    if family.arch == "phi3":
        original = _original_context(config)
        writer.add_rope_dimension_count(_rotary_size(config))
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            # max_position_embeddings, not context_length: the factors were made for the former
            # (transformers' _compute_longrope_parameters).
            scale = config.max_position_embeddings / original
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(factor)


def _original_context(config: Any) -> int:
    rope = full_rope(config)
    return int(
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


def _rotary_size(config: Any) -> int:
    return int(head_size(config) * full_rope(config).get("partial_rotary_factor", 1.0))


def rope_tensors(config: Any) -> dict[str, Sequence[float]]:
    """Return llama.cpp's tensor name -> divisors of the rotary frequencies, [head_size / 2].

    Empty unless the model's rope_type is llama3 or longrope.
    """
    rope = full_rope(config)
    if rope["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": rope["long_factor"],
            "rope_factors_short.weight": rope["short_factor"],
        }
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, head_size(config))}
    return {}


def _llama3_factors(rope: dict[str, Any], size: int) -> list[float]:
    """Compute the divisors [size / 2] that Llama 3.1 applies to the rotary frequencies.

    Low frequencies are divided by ``factor``, high ones by 1, with a smooth transition; see
    _compute_llama3_parameters in transformers.
    """
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, size, 2):
        turns = original / (2 * math.pi * rope["rope_theta"] ** (i / size))
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - kept) / rope["factor"] + kept))
    return factors
