"""Attention over a packed stream in which rollouts share their prompt's keys.

One function is registered with transformers under the name ``rlsloth``. With a PackedLayout among
the model's keyword arguments it attends over the stream; without one (decoding with a cache) it is
plain SDPA with the given mask. The backend is picked once, in ``choose_backend``.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rlsloth.records import MicroBatch, UserError

NAME = "rlsloth"
TREE_LIMIT = 2048
"""Longest tree that SDPA takes as one masked square; longer ones go sequence by sequence."""


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the segments of a stream lie, in the form the chosen backend wants. Made once per
    micro-batch."""

    backend: str
    cu_q: Tensor
    cu_k: Tensor
    kv_index: Tensor
    max_q: int
    max_k: int
    sequences: tuple[tuple[slice, slice], ...] = ()
    """(rows of the sequence in kv_index, rows of the stream it yields), for one call a sequence."""
    tree_index: Tensor | None = None
    """[B, L] stream rows of each tree, padded with 0."""
    tree_mask: Tensor | None = None
    """[B, 1, L, L] bool: True where a row may see a column."""
    tree_rows: Tensor | None = None
    """[T] position of each stream row in the flattened [B, L]."""
    block_mask: Any = None
    """flex attention's mask."""


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


def choose_backend(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention backend of a run.

    Raises:
        UserError: the backend asked for does not work here.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    usable = available_backends() if device.type == "cuda" and half else ["sdpa"]
    if asked == "auto":
        return usable[0]
    if asked not in usable:
        raise UserError(
            f"--model.attention {asked} does not work on {device} in {str(dtype)[6:]}; "
            f"here: {', '.join(usable)}"
        )
    return asked


def make_layout(micro: MicroBatch, backend: str) -> PackedLayout:
    """Prepare a micro-batch (already on its device) for ``backend``."""
    layout = PackedLayout(
        backend,
        cu_q=micro.cu_seqlens_q,
        cu_k=micro.cu_seqlens_k,
        kv_index=micro.kv_index,
        max_q=int(micro.cu_seqlens_q.diff().max()),
        max_k=int(micro.cu_seqlens_k.diff().max()),
    )
    if backend == "flex":
        return replace(layout, block_mask=_block_mask(micro))
    if backend == "cudnn":
        return replace(layout, sequences=_sequences(micro))
    if backend != "sdpa":
        return layout
    if int(_tree_sizes(micro).max()) > TREE_LIMIT:
        return replace(layout, backend="sequences", sequences=_sequences(micro))
    index, mask, rows = _trees(micro)
    return replace(layout, tree_index=index, tree_mask=mask, tree_rows=rows)


def _tree_sizes(micro: MicroBatch) -> Tensor:
    trees = int(micro.tree_of[-1]) + 1
    lengths = micro.cu_seqlens_q.diff().long()
    return torch.zeros(trees, dtype=torch.long, device=lengths.device).index_add_(
        0, micro.tree_of, lengths
    )


def _segment_rows(micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """[T] segment of each stream row, [T] tree of each stream row."""
    lengths = micro.cu_seqlens_q.diff().long()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return segment, micro.tree_of[segment]


def _is_prompt(micro: MicroBatch) -> Tensor:
    """[S] True for each tree's first segment."""
    first = torch.ones_like(micro.tree_of, dtype=torch.bool)
    first[1:] = micro.tree_of[1:] != micro.tree_of[:-1]
    return first


def _trees(micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """A PackedLayout's tree_index, tree_mask and tree_rows."""
    sizes = _tree_sizes(micro)
    longest = int(sizes.max())
    segment, tree = _segment_rows(micro)
    start = sizes.cumsum(0) - sizes
    column = torch.arange(len(segment), device=segment.device) - start[tree]
    rows = tree * longest + column
    index = torch.zeros(len(sizes) * longest, dtype=torch.long, device=segment.device)
    index[rows] = torch.arange(len(segment), device=segment.device)
    padded = torch.full((len(sizes) * longest,), -1, device=segment.device)
    padded[rows] = segment
    padded = padded.view(len(sizes), longest)
    prompt = _is_prompt(micro)[padded.clamp(min=0)] & (padded >= 0)
    mask = (padded[:, :, None] == padded[:, None, :]) | prompt[:, None, :]
    order = torch.arange(longest, device=segment.device)
    mask &= order[:, None] >= order[None, :]
    # Padding rows see themselves: a row that sees nothing is NaN, and NaN * 0 poisons the backward
    # pass.
    mask |= torch.eye(longest, dtype=torch.bool, device=segment.device)
    return index.view(len(sizes), longest), mask[:, None], rows


def _sequences(micro: MicroBatch) -> tuple[tuple[slice, slice], ...]:
    """Each segment as a square problem over prompt + own rows, of which the own rows are kept."""
    q, k = micro.cu_seqlens_q.tolist(), micro.cu_seqlens_k.tolist()
    return tuple(
        (slice(k[s], k[s + 1]), slice(q[s], q[s + 1])) for s in range(len(q) - 1) if q[s + 1] > q[s]
    )


def _block_mask(micro: MicroBatch) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    segment, tree = _segment_rows(micro)
    prompt = _is_prompt(micro)[segment]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (segment[q] == segment[k]) | (prompt[k] & (tree[q] == tree[k]))
        return near & (q >= k)

    total = len(segment)
    return create_block_mask(visible, None, None, total, total, device=str(segment.device))


def packed_attention(
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
    """transformers' attention interface: query [B, heads, L, D], key and value [B, kv_heads, L_k,
    D].

    Returns [B, L, heads, D] and None. Grouped-query heads are passed on as they are.
    """
    if softcap is not None or s_aux is not None:
        raise UserError(
            f"{type(module).__name__}: attention with soft-capping or sinks is not supported yet"
        )
    if packed is None and query.shape[2] == 1 and query.is_cuda and attention_mask is not None:
        out = _attend_one(query, key, value, attention_mask, scaling or query.shape[3] ** -0.5)
        return out.transpose(1, 2), None
    if packed is None:
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    if sliding_window is not None and packed.max_k > sliding_window:
        raise UserError(
            f"sequences of {packed.max_k} tokens exceed the model's sliding window of "
            f"{sliding_window}, which packed training lacks so far; lower --rollout.max-tokens"
        )
    out = _BACKENDS[packed.backend](query[0], key[0], value[0], packed, scaling)
    return out[None], None


def _attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Decoding's one row a sequence: two batched products, each reading the cache once.

    SDPA with a mask would first copy the cache out to as many heads as the queries have.
    """
    batch, heads, _, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch * kv_heads, heads // kv_heads, width)
    columns = key.flatten(0, 1).transpose(1, 2)
    if query.dtype == torch.float32:
        scores = torch.bmm(grouped, columns)
    else:
        scores = torch.bmm(grouped, columns, out_dtype=torch.float32)
    scores = scores.view(batch, kv_heads, -1, key.shape[2]) * scale
    weights = scores.masked_fill_(~mask, -torch.inf).softmax(-1).to(value.dtype)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(batch, heads, 1, -1)


def _attend_trees(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float | None
) -> Tensor:
    index, rows = packed.tree_index, packed.tree_rows
    assert index is not None
    assert rows is not None
    q, k, v = (x[:, index].transpose(0, 1) for x in (q, k, v))
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=packed.tree_mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)[rows]


def _attend_sequences(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float | None
) -> Tensor:
    pieces = []
    for keys, own in packed.sequences:
        rows = packed.kv_index[keys]
        square = scaled_dot_product_attention(
            q[None, :, rows],
            k[None, :, rows],
            v[None, :, rows],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        pieces.append(square[0, :, -(own.stop - own.start) :].transpose(0, 1))
    return torch.cat(pieces)


def _attend_cudnn(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float | None
) -> Tensor:
    # cuDNN refuses a single key; such sequences go to the next one.
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        return _attend_sequences(q, k, v, packed, scale)


def _stream(x: Tensor, index: Tensor | None = None) -> Tensor:
    """[heads, T, D] to a contiguous [T, heads, D], gathered by index."""
    x = x.transpose(0, 1)
    return x.contiguous() if index is None else x[index]


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 spells causality is_causal; later releases window_size=(-1, 0). Both align at the
    # end.
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    repeat = q.shape[0] // k.shape[0]
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    elif repeat > 1:
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    if "scale" in known:
        causal["scale"] = scale
    elif scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    out: Any = varlen_attn(
        _stream(q),
        _stream(k, packed.kv_index),
        _stream(v, packed.kv_index),
        packed.cu_q,
        packed.cu_k,
        packed.max_q,
        packed.max_k,
        **causal,
    )
    attended: Tensor = out
    return attended


def _attend_fa4(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float | None
) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        _stream(q),
        _stream(k, packed.kv_index),
        _stream(v, packed.kv_index),
        cu_seqlens_q=packed.cu_q,
        cu_seqlens_k=packed.cu_k,
        max_seqlen_q=packed.max_q,
        max_seqlen_k=packed.max_k,
        softmax_scale=scale,
        causal=True,
    )
    attended: Tensor = out[0] if isinstance(out, tuple) else out
    return attended


_compiled_flex: Callable[..., Tensor] | None = None


def _attend_flex(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float | None
) -> Tensor:
    global _compiled_flex
    from torch.nn.attention.flex_attention import flex_attention

    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention)
    out = _compiled_flex(
        q[None], k[None], v[None], block_mask=packed.block_mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": _attend_trees,
    "sequences": _attend_sequences,
    "cudnn": _attend_cudnn,
    "varlen": _attend_varlen,
    "fa4": _attend_fa4,
    "flex": _attend_flex,
}


def register() -> None:
    """Make the attention known to transformers under ``rlsloth`` (public AttentionInterface)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
