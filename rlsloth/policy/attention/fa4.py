"""Attention backend ``fa4``: flash-attention 4 (extra ``fa4``), for Hopper and Blackwell GPUs."""

from __future__ import annotations

import fcntl
import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsloth.files import cache_folder
from rlsloth.policy.attention.backend import Backend, Halves, flash, has_gpu
from rlsloth.policy.attention.kept import attend_in_halves
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.attention.repeated import repeated_keys

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


def _lengths(packed: PackedLayout) -> dict[str, Any]:
    return {
        "cu_seqlens_q": packed.cu_q,
        "cu_seqlens_k": packed.cu_k,
        "max_seqlen_q": packed.max_q,
        "max_seqlen_k": packed.max_k,
    }


@torch.no_grad()
def _forward(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float
) -> tuple[Tensor, Tensor]:
    # With log-sums also where no gradient needs them: one compiled kernel serves both.
    out, sums = _function()(
        q, k, v, **_lengths(packed), softmax_scale=scale, causal=True, return_lse=True
    )
    return out, sums


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    packed: PackedLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # The library has no public name for it (flash-attn-4 4.0.0b36).
    from flash_attn.cute.interface import _flash_attn_bwd

    found = _flash_attn_bwd(q, k, v, out, grad, sums, scale, True, **_lengths(packed))
    return found[0], found[1], found[2]


HALVES = Halves(_forward, _backward)


def _attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    return attend_in_halves(*repeated_keys(q, k, v, packed), HALVES, packed, scale)


FA4 = Backend("fa4", _attend, works=_works, halves=HALVES, memory=partial(flash, expands=False))
