"""Attention over a packed stream in which rollouts share their prompt's keys.

One function is registered with transformers under the name ``rlsloth``. With a PackedLayout among
the model's keyword arguments it attends over the stream; without one (prefill, decoding with a
cache) it takes the given mask. The backend is picked once, in ``choose_backend``; layers with
soft-capping, sinks or a sliding window shorter than a sequence take the plain path, which knows all
three.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from rlsloth.errors import UserError
from rlsloth.policy.attention.backends import BACKENDS
from rlsloth.policy.attention.layout import PackedLayout

NAME = "rlsloth"
BLOCK_ROWS = 512
"""Rows of a long sequence whose scores exist at once on the plain path."""
SMALL = 10**9
"""Parameters of a model whose layers are too short for what is fastest at length: flash-attention 4
takes 3 s to import and 10 s to compile, cuDNN a call for each sequence."""


def available_backends() -> list[str]:
    """Packed attention backends that work on this machine, fastest first."""
    found = []
    if torch.cuda.is_available():
        major = torch.cuda.get_device_capability()[0]
        if major >= 9 and _has_fa4():
            found.append("fa4")
        if major >= 8:
            found += ["cudnn", "varlen", "flex"]
    return [*found, "sdpa"]


def _has_fa4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # no flash_attn at all
        return False


def choose_backend(
    asked: str, device: torch.device, dtype: torch.dtype, config: Any, parameters: int
) -> str:
    """The attention backend of a run, for a model of this text configuration.

    Raises:
        UserError: the backend asked for does not work here.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    usable = available_backends() if device.type == "cuda" and half else ["sdpa"]
    if asked == "auto":
        small = parameters < SMALL and _varlen_takes(config)
        return "varlen" if "varlen" in usable and small else usable[0]
    if asked not in usable:
        raise UserError(
            f"--model.attention {asked} does not work on {device} in {str(dtype)[6:]}; "
            f"here: {', '.join(usable)}"
        )
    return asked


def _varlen_takes(config: Any) -> bool:
    """Heads of one size, which torch's varlen attention does not pad."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    others = (getattr(config, name, None) or size for name in ("v_head_dim", "global_head_dim"))
    return size % 8 == 0 and size <= 256 and all(other == size for other in others)


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
    """transformers' attention interface: query [B, heads, L, D]; others [B, kv_heads, L_k, D].

    Without ``packed``, ``attention_mask`` is a causal [B, 1, L, L_k] bool, True where a row may
    look, or None for the square causal one. Returns [B, L, heads, D] and None.
    """
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    longest = packed.max_k if packed is not None else key.shape[2]
    window = sliding_window if sliding_window and longest > sliding_window else None
    special = window is not None or softcap or s_aux is not None
    if packed is not None:
        if not special:
            return BACKENDS[packed.backend](query[0], key[0], value[0], packed, scale)[None], None
        plain = partial(_plain, scale=scale, window=window, softcap=softcap, sinks=s_aux)
        return _plain_packed(plain, query[0], key[0], value[0], packed)[None], None
    if special or (query.shape[2] == 1 and query.is_cuda and attention_mask is not None):
        if attention_mask is None:
            rows = torch.arange(query.shape[2], device=query.device)
            attention_mask = (rows[:, None] >= rows[None, :])[None, None]
        at = columns = None
        if window is not None:  # in a causal mask, row i sees i + 1 columns up to its own
            at = attention_mask.sum(-1) - 1
            columns = torch.arange(key.shape[2], device=key.device)
        options = (scale, window, softcap, s_aux)
        return _plain(query, key, value, attention_mask, at, columns, *options), None
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


def _plain_packed(
    plain: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout
) -> Tensor:
    """The plain path over a stream: small trees whole, long sequences in blocks of rows.

    Blocks are recomputed in the backward pass, so that no more than one block's scores exist.
    """
    pieces = []
    for bucket in packed.buckets:
        at = packed.positions[bucket.index][:, None]
        square = (x[:, bucket.index].transpose(0, 1) for x in (q, k, v))
        pieces.append(
            plain(*square, bucket.mask, at, at[..., None, :]).flatten(0, 1)[bucket.places]
        )
    for rows, keep in packed.long_sequences:
        keys, values, at = k[None, :, rows], v[None, :, rows], packed.positions[rows]
        for own in range(len(rows) - keep, len(rows), BLOCK_ROWS):
            block = slice(own, min(own + BLOCK_ROWS, len(rows)))
            mask = (at[block, None] >= at[None, :])[None, None]
            queries = q[None, :, rows[block]]
            out = checkpoint(plain, queries, keys, values, mask, at[block], at, use_reentrant=False)
            pieces.append(out[0])
    return torch.cat(pieces)[packed.back]


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    row_at: Tensor | None,
    column_at: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention as it is defined, scores in float32: [B, L, heads, D].

    Query heads of one key head are folded into rows, so that each product reads the cache once;
    SDPA with a mask would first copy it out to as many heads as the queries have. That is what
    makes it the fast way for a decoding step, too. A window compares the positions
    ``row_at`` and ``column_at``.
    """
    batch, heads, rows, width = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    if window is not None:
        assert row_at is not None
        assert column_at is not None
        mask = mask & (row_at[..., None] - column_at < window)
    folded = query.reshape(batch * kv_heads, heads // kv_heads * rows, width)
    across = key.flatten(0, 1).transpose(1, 2)
    if query.is_cuda and query.dtype != torch.float32 and not torch.is_grad_enabled():
        scores = torch.bmm(folded, across, out_dtype=torch.float32)
    else:
        scores = torch.bmm(folded.float(), across.float())
    scores = scores.view(batch, heads, rows, columns) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:  # a sink takes part in the sum and gives nothing (gpt-oss)
        sink = sinks.float().view(1, heads, 1, 1).expand(batch, heads, rows, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    folded = weights.to(value.dtype).reshape(batch * kv_heads, -1, columns)
    out = torch.bmm(folded, value.flatten(0, 1))
    return out.view(batch, heads, rows, value.shape[-1]).transpose(1, 2)


def register() -> None:
    """Make the attention known to transformers under ``rlsloth`` (public AttentionInterface)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def whole_attention(model: Any) -> str:
    """transformers' own attention that leaves nothing of a model out: torch's (sdpa) has no soft
    caps (Gemma 2) and no sinks (gpt-oss)."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped or not model._supports_sdpa else "sdpa"
