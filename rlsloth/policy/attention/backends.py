"""Packed attention backends: q [heads, T, D], k and v [kv_heads, T, D] to [T, heads, D]."""

from __future__ import annotations

import fcntl
import inspect
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rlsloth.policy.attention.layout import PackedLayout, Repeated


def _sdpa(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    """A masked square for each small tree, one call a sequence for the rest."""
    pieces = []
    for bucket in packed.buckets:
        square = scaled_dot_product_attention(
            q[:, bucket.index].transpose(0, 1),
            k[:, bucket.index].transpose(0, 1),
            v[:, bucket.index].transpose(0, 1),
            attn_mask=bucket.mask,
            scale=scale,
            enable_gqa=True,
        )
        pieces.append(square.transpose(1, 2).flatten(0, 1)[bucket.places])
    for rows, keep in packed.long_sequences:
        square = scaled_dot_product_attention(
            q[None, :, rows],
            k[None, :, rows],
            v[None, :, rows],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        pieces.append(square[0, :, -keep:].transpose(0, 1))
    return torch.cat(pieces)[packed.back]


class _Repeat(torch.autograd.Function):
    """[T, ...] to [T_kv, ...]. Indexing would do it; its gradient sums in the type of ``x``, and
    sorts all rows for that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Repeated, summed: bool) -> Tensor:
        ctx.rows, ctx.summed = rows, summed
        return x.index_select(0, rows.index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), rows = grads, ctx.rows
        own = grad.index_select(0, rows.own)
        if not ctx.summed or not len(rows.again):
            return own, None, None
        total, places = own.float(), (rows.index[rows.again],)
        total.index_put_(places, grad.index_select(0, rows.again).float(), accumulate=True)
        return total.to(grad.dtype), None, None


class _Keep(torch.autograd.Function):
    """[T_kv, ...] to [T, ...]: each row where it comes for its own sake."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Repeated) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), rows = grads, ctx.rows
        spread = grad.new_zeros(len(rows.index), *grad.shape[1:])
        return spread.index_copy_(0, rows.own, grad), None


def _repeat(x: Tensor, packed: PackedLayout, summed: bool = True) -> Tensor:
    """[heads, T, D] to [T_kv, heads, D] with prompts laid out again. ``summed``: repetitions have a
    part in the gradient."""
    return _Repeat.apply(x.transpose(0, 1), packed.repeated, summed)  # type: ignore[no-untyped-call, no-any-return]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    """One call a segment, over its prompt, too. A prompt's rows are kept where it stands alone, so
    the queries of its repetitions get a gradient of exactly 0."""
    streams = (_repeat(q, packed, summed=False), _repeat(k, packed), _repeat(v, packed))
    pieces = (torch.split(s.transpose(0, 1)[None], packed.lengths, 2) for s in streams)
    # cuDNN refuses a single key; such sequences go to the next one.
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        squares = [
            scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=True)
            for a, b, c in zip(*pieces, strict=True)
        ]
    # squeeze, because [0] would give the output's gradient strides that grow with the stream: torch
    # keeps cuDNN's plans without them, and would read past the end (torch 2.11).
    stream = torch.cat(squares, 2).squeeze(0).transpose(0, 1)
    return _Keep.apply(stream, packed.repeated)  # type: ignore[no-untyped-call, no-any-return]


def _stream(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads, D] queries, and [T_kv, kv_heads, D] keys and values with prompts laid out
    again."""
    return q.transpose(0, 1).contiguous(), _repeat(k, packed), _repeat(v, packed)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 spells causality is_causal; later releases window_size. Both align at the end.
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
    out: Any = varlen_attn(
        *_stream(q, k, v, packed), packed.cu_q, packed.cu_k, packed.max_q, packed.max_k, **options
    )
    attended: Tensor = out
    return attended


_FA4_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_"


def _cache_folder() -> Path | None:
    """Where files can be written and locked, as flash-attention 4 does; None if not there."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        place = root / "rlsloth" / "flash_attention_4"
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, RuntimeError):  # no home; a read-only or full one; one without locks
        return None
    return place


@cache
def _flash_attention_4() -> Callable[..., Any]:
    """It compiles for 10 s in each process unless told to keep the result, and where."""
    if _FA4_CACHE + "ENABLED" not in os.environ and (place := _cache_folder()):
        os.environ[_FA4_CACHE + "ENABLED"] = "1"
        os.environ.setdefault(_FA4_CACHE + "DIR", str(place))
    from flash_attn.cute import flash_attn_varlen_func

    function: Callable[..., Any] = flash_attn_varlen_func
    return function


def _fa4(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    out = _flash_attention_4()(
        *_stream(q, k, v, packed),
        cu_seqlens_q=packed.cu_q,
        cu_seqlens_k=packed.cu_k,
        max_seqlen_q=packed.max_q,
        max_seqlen_k=packed.max_k,
        softmax_scale=scale,
        causal=True,
        return_lse=not q.requires_grad,  # one kernel with and without gradients
    )
    attended: Tensor = out[0] if isinstance(out, tuple) else out
    return attended


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    out = _compiled_flex()(
        q[None],
        k[None],
        v[None],
        block_mask=packed.block_mask,
        scale=scale,
        enable_gqa=True,
        # Below 128 rows torch 2.11 would pick its decoding kernel and find no configuration for it.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out[0].transpose(0, 1)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, PackedLayout, float], Tensor]] = {
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "varlen": _varlen,
    "fa4": _fa4,
    "flex": _flex,
}
