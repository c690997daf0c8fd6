"""Which model families can be written as GGUF, and their hyperparameters under llama.cpp's keys.

Facts are those of llama.cpp's loaders (src/models/*.cpp) and of its converter
(convert_hf_to_gguf.py), both of version 0.3.36 of llama-cpp-python's source distribution; a test
compares what is written here with that converter's output, key by key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError


@dataclass(frozen=True, slots=True)
class Family:
    """llama.cpp's expectations of a family."""

    arch: str
    """The architecture's name in llama.cpp."""
    permuted: bool = False
    """Rotary positions turn neighbouring dimensions (0, 1), (2, 3), …; transformers turns (0, d/2),
    (1, d/2 + 1), …: the rows of query and key projections are reordered."""
    norm_shift: float = 0.0
    """Added to every norm's weight; Gemma multiplies by 1 + weight."""
    activation: str = "silu"
    window_every: int = 0
    """Every so many layers one attends to everything, the others within the sliding window, as
    llama.cpp has it built in. 0: llama.cpp knows no window for this family."""
    layers_27b: int = 0
    """Models of so many layers scale attention by hidden size / heads instead of the head size."""


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
"""transformers' model types. Phi-4 is of type phi3, SmolLM2 of type llama."""


def read_config(folder: Path) -> Any:
    """The model's configuration, in transformers' current form.

    Raises:
        UserError: no configuration, or a family that cannot be written.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; a GGUF is written from a merged model's folder")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{folder}: model type {config.model_type!r} cannot be written as GGUF; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    _check(folder, config, FAMILIES[config.model_type])
    return config


def family_of(config: Any) -> Family:
    return FAMILIES[config.model_type]


def head_size(config: Any) -> int:
    """Dimensions of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _check(folder: Path, config: Any, family: Family) -> None:
    """Refuse what llama.cpp would run differently."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise UserError(
            f"{folder}: llama.cpp runs {family.arch} with {family.activation}, not {activation}"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"{folder}: weights are quantised; merge into 16 bits first")
    if family.window_every:
        full = [(i + 1) % family.window_every == 0 for i in range(config.num_hidden_layers)]
        if [kind == "full_attention" for kind in config.layer_types] != full:
            raise UserError(
                f"{folder}: llama.cpp expects every {family.window_every}th layer of "
                f"{family.arch} to attend to everything, and no other"
            )
        scale = head_size(config)
        if config.num_hidden_layers == family.layers_27b:
            scale = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != scale:
            raise UserError(
                f"{folder}: llama.cpp scales the attention of {family.arch} by {scale}, not by "
                f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
            )
    if family.arch == "phi3" and head_size(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        raise UserError(f"{folder}: llama.cpp expects heads of phi3 to add up to the hidden size")
    rope = full_rope(config)
    allowed = {"default", "llama3", "linear", "yarn"}
    if family.arch == "phi3":
        allowed = {"default", "longrope"}
    if rope["rope_type"] not in allowed or (
        family.arch != "llama" and rope["rope_type"] == "llama3"
    ):
        raise UserError(
            f"{folder}: rope_type {rope['rope_type']!r} cannot be written for {family.arch}"
        )
    if family.arch != "phi3" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{folder}: partial_rotary_factor cannot be written for {family.arch}")


def full_rope(config: Any) -> dict[str, Any]:
    """Rotary parameters, of the layers that attend to everything where there are two kinds."""
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def context_length(config: Any) -> int:
    """Tokens of context, at most those within which llama.cpp computes what transformers does:
    where it knows no sliding window, the window is the limit."""
    limit = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and "sliding_attention" in kinds and not family_of(config).window_every:
        return min(limit, int(window))
    return limit


def add_hyperparameters(writer: Any, config: Any) -> None:
    """Everything llama.cpp needs to know of the model but its vocabulary."""
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
            # The length that the factors were made for, not the window's (transformers'
            # _compute_longrope_parameters).
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
    """Divisors of the rotary frequencies, under llama.cpp's tensor names; most models have none."""
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
    """By how much Llama 3.1 divides each rotary frequency (transformers'
    _compute_llama3_parameters): low frequencies by ``factor``, high ones by 1, smooth between."""
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, size, 2):
        turns = original / (2 * math.pi * rope["rope_theta"] ** (i / size))
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - kept) / rope["factor"] + kept))
    return factors
