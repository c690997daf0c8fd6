"""Attention over a packed stream, in which rollouts share their prompt's keys, for transformers.

One function is registered in transformers' attention interface under the name ``rlsloth``. If the
model is called with a PackedLayout as the keyword ``packed``, it attends over the packed stream;
otherwise (prefill, decoding with a cache) it uses the mask. Layers with soft caps, sinks, or a
sliding window shorter than a sequence are computed in plain torch (plain.py), all further layers by
the run's backend (backends.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlsloth.policy.activations.passes import current_pass
from rlsloth.policy.attention.backends import BACKENDS
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.attention.plain import plain_attention, plain_packed

NAME = "rlsloth"
"""The attention's name in transformers' interface."""


def attend(
    module: torch.nn.Module,  # noqa: ARG001 (transformers passes it)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 (transformers passes it)
    packed: PackedLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from queries over keys and values (the signature is transformers').

    Args:
        module: ignored.
        query: [B, heads, L, D].
        key, value: [B, kv_heads, L_k, D].
        attention_mask: causal [B, 1, L, L_k] bool: True where a row sees a column. None: square.
        scaling: factor of the scores; 1 / sqrt(D) by default.
        dropout: ignored, so that the trained distribution is the sampled one.
        packed: layout of a packed stream, used in place of the mask; B is 1 then.
        sliding_window: number of positions that a row sees, including its own.
        softcap, s_aux: cap of the scores (Gemma 2), and [heads] sinks (gpt-oss).

    Returns:
        The output [B, L, heads, D], and None in place of the weights.
    """
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    longest = packed.max_k if packed is not None else key.shape[2]
    window = sliding_window if sliding_window and longest > sliding_window else None
    special = window is not None or softcap or s_aux is not None
    if packed is not None:
        over_stream = _over_stream(packed, scale, window, softcap, s_aux)
        return over_stream(query[0], key[0], value[0])[None], None
    if special or (query.shape[2] == 1 and query.is_cuda and attention_mask is not None):
        if attention_mask is None:
            rows = torch.arange(query.shape[2], device=query.device)
            attention_mask = (rows[:, None] >= rows[None, :])[None, None]
        at = columns = None
        if window is not None:  # a row's position: in a causal mask, row i sees i + 1 columns
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


def _over_stream(
    packed: PackedLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function that attends over a packed stream: the run's backend, or plain torch."""
    if window is None and not softcap and sinks is None:
        backend = BACKENDS[packed.backend]

        def attend_packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return backend.attend(query, key, value, packed, scale)

        # A backend in two halves has one forward (kept.py).
        return attend_packed if backend.halves else partial(_in_both_forwards, attend_packed)
    plain = partial(plain_attention, scale=scale, window=window, softcap=softcap, sinks=sinks)
    return partial(_in_both_forwards, partial(plain_packed, plain, packed=packed))


def _in_both_forwards(
    attend_packed: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attend; in a layer's first forward as in the second one.

    Where no gradient is needed, torch (and plain.py) may choose kernels that add in another order.
    """
    layer = current_pass()
    if layer is None or layer.again:
        return attend_packed(query, key, value)
    with torch.enable_grad():
        return attend_packed(*(x.detach().requires_grad_() for x in (query, key, value))).detach()


def register() -> None:
    """Register the attention with transformers as ``rlsloth``, by its public interface."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def whole_attention(model: Any) -> str:
    """Name an attention implementation of transformers that is right for this model.

    That is ``eager`` for models with soft caps (Gemma 2) or sinks (gpt-oss), which torch's ``sdpa``
    does not compute, and else ``sdpa``.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped or not model._supports_sdpa else "sdpa"
