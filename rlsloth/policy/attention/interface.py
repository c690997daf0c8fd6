"""transformers' attention interface over a packed stream in which rollouts share prompt keys.

One function is registered with transformers under the name ``rlsloth``. With a PackedLayout among
the model's keyword arguments it attends over the stream; without one (prefill, decoding with a
cache) it takes the given mask. Layers with soft caps, sinks, or a sliding window shorter than a
sequence take the plain path, which knows all three; others take the run's backend (backends.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlsloth.policy.attention.backends import BACKENDS
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.attention.plain import plain_attention, plain_packed

NAME = "rlsloth"


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: PackedLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of query [B, heads, L, D] over key and value [B, kv_heads, L_k, D].

    Without ``packed``, ``attention_mask`` is a causal [B, 1, L, L_k] bool, True where a row may
    look, or None for the square causal one. Returns [B, L, heads, D] and None.
    """
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    longest = packed.max_k if packed is not None else key.shape[2]
    window = sliding_window if sliding_window and longest > sliding_window else None
    special = window is not None or softcap or s_aux is not None
    if packed is not None:
        if not special:
            attend_packed = BACKENDS[packed.backend].attend
            return attend_packed(query[0], key[0], value[0], packed, scale)[None], None
        plain = partial(plain_attention, scale=scale, window=window, softcap=softcap, sinks=s_aux)
        return plain_packed(plain, query[0], key[0], value[0], packed)[None], None
    if special or (query.shape[2] == 1 and query.is_cuda and attention_mask is not None):
        if attention_mask is None:
            rows = torch.arange(query.shape[2], device=query.device)
            attention_mask = (rows[:, None] >= rows[None, :])[None, None]
        at = columns = None
        if window is not None:  # in a causal mask, row i sees i + 1 columns up to its own
            at = attention_mask.sum(-1) - 1
            columns = torch.arange(key.shape[2], device=key.device)
        options = (scale, window, softcap, s_aux)
        return plain_attention(query, key, value, attention_mask, at, columns, *options), None
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2), None


def register() -> None:
    """Register the attention with transformers as ``rlsloth``, through its public interface."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def whole_attention(model: Any) -> str:
    """The name of an attention of transformers' own that computes all of this model: torch's
    (``sdpa``) has no soft caps (Gemma 2) and no sinks (gpt-oss)."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped or not model._supports_sdpa else "sdpa"
