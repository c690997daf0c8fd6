"""Attention backend ``varlen``: torch's attention over sequences of varying length."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from rlsloth.policy.attention.backend import AttentionMemory, Backend, Widths, flash, has_gpu
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.attention.repeated import repeated_keys
from rlsloth.policy.config_values import differs_by_layer, value_of


def _attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # A causal mask is is_causal in torch 2.11, and window_size in later releases. Both align the
    # last query with the last key.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    stream = repeated_keys(q, k, v, packed)
    out: Any = varlen_attn(*stream, packed.cu_q, packed.cu_k, packed.max_q, packed.max_k, **options)
    attended: Tensor = out
    return attended


def _takes(config: Any) -> bool:
    """Tell whether all heads have one size that torch's kernel supports without padding."""
    if differs_by_layer(config, "head_dim"):  # Gemma 4
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    further = (value_of(config, name) or size for name in ("v_head_dim", "global_head_dim"))
    return size % 8 == 0 and size <= 256 and all(other == size for other in further)


def _memory(w: Widths) -> AttentionMemory:
    from torch.nn.attention.varlen import varlen_attn

    expands = "enable_gqa" not in inspect.signature(varlen_attn).parameters
    return flash(w, expands=expands)


VARLEN = Backend(
    "varlen",
    _attend,
    works=lambda: has_gpu(8),
    starts_quickly=True,
    takes=_takes,
    memory=_memory,
)
