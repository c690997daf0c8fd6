"""Attention backend ``fa4``: flash-attention 4 (extra ``fa4``), for Hopper and Blackwell GPUs."""

from __future__ import annotations

import fcntl
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsloth.files import cache_folder
from rlsloth.policy.attention.backend import (
    AttentionMemory,
    Backend,
    Halves,
    Widths,
    flash,
    has_gpu,
)
from rlsloth.policy.attention.kept import attend_in_halves
from rlsloth.policy.attention.layout import PackedLayout, Sequences

_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_"
MAJORS = (9, 10, 11)
"""Major compute capabilities with right gradients. On 12 (RTX 50), where heads share keys, sums for
the gradients of keys and values are written at other places than they are read from, as soon as a
sequence before has no whole number of tiles (flash-attn-4 4.0.0b36: offset_k + batch * tile in
flash_bwd.py, but rounded down to a tile in flash_bwd_postprocess.py)."""


def _works() -> bool:
    if not has_gpu(9) or torch.cuda.get_device_capability()[0] not in MAJORS:
        return False
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # flash_attn is not installed
        return False


def _cache_folder() -> Path | None:
    """Make a folder for compiled kernels; None if files cannot be written and locked there."""
    folder = cache_folder("flash_attention_4")
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # a read-only, full or lockless file system
        return None
    return folder


@cache
def _function() -> Callable[..., Any]:
    """Import flash-attention 4's function, and let it keep compiled kernels on disk.

    Without its two environment variables every process would compile for 10 s.
    """
    if _CACHE + "ENABLED" not in os.environ and (folder := _cache_folder()):
        os.environ[_CACHE + "ENABLED"] = "1"
        os.environ.setdefault(_CACHE + "DIR", str(folder))
    from flash_attn.cute import flash_attn_varlen_func

    function: Callable[..., Any] = flash_attn_varlen_func
    return function


SEVERAL_TILES = 257
"""Tokens that are longer than any tile of the kernels."""


def _lengths(sequences: Sequences) -> dict[str, Any]:
    # The library compiles kernels of their own for sequences of one tile, which takes 10 s in the
    # middle of a run. A longer bound than the longest sequence is allowed.
    return {
        "cu_seqlens_q": sequences.cu_q,
        "cu_seqlens_k": sequences.cu_k,
        "seqused_q": sequences.used_q,
        "max_seqlen_q": max(sequences.max_q, SEVERAL_TILES),
        "max_seqlen_k": max(sequences.max_k, SEVERAL_TILES),
        "causal": sequences.causal,
    }


@torch.no_grad()
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float
) -> tuple[Tensor, Tensor]:
    # With log-sums also where no gradient needs them: one compiled kernel serves both.
    out, sums = _function()(q, k, v, **_lengths(sequences), softmax_scale=scale, return_lse=True)
    return out, sums


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    sequences: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # The library has no public name for it (flash-attn-4 4.0.0b36).
    from flash_attn.cute.interface import _flash_attn_bwd

    lengths = _lengths(sequences)
    found = _flash_attn_bwd(q, k, v, out, grad, sums.contiguous(), scale, **lengths)
    return found[0], found[1], found[2]


HALVES = Halves(_forward, _backward)


def _attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    return attend_in_halves(q, k, v, HALVES, packed, scale)


def _memory(w: Widths) -> AttentionMemory:
    own = flash(replace(w, repeats=1.0), expands=False)
    if w.repeats == 1:
        return own
    # The second call: the prompts' keys and values with their gradients, gradients of queries, and
    # log-sums. Its float32 sums take the place of the first one's.
    more = (w.queries + 4 * w.keys) * w.size + 4 * w.heads
    return replace(own, buffers=own.buffers + more)


FA4 = Backend("fa4", _attend, works=_works, halves=HALVES, memory=_memory)
