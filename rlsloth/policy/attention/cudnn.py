"""Attention backend ``cudnn``: cuDNN through torch, with one call for each sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rlsloth.policy.attention.backend import Backend, has_gpu
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.attention.repeated import keep, repeat


def _attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    """Attend with one call for each segment together with its prompt.

    A prompt's output is taken from the prompt's own segment, so that the queries of its repetitions
    get gradients of exactly 0.
    """
    streams = (repeat(q, packed, summed=False), repeat(k, packed), repeat(v, packed))
    pieces = (torch.split(s.transpose(0, 1)[None], packed.lengths, 2) for s in streams)
    # cuDNN refuses sequences of a single key, which the next backend in the list then computes.
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        squares = [
            scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=True)
            for a, b, c in zip(*pieces, strict=True)
        ]
    # squeeze rather than [0]: with [0] the output's gradient has strides that depend on the length
    # of the stream, which torch 2.11 ignores when it looks up cuDNN's plans, and cuDNN would read
    # beyond the end.
    return keep(torch.cat(squares, 2).squeeze(0).transpose(0, 1), packed)


CUDNN = Backend("cudnn", _attend, works=lambda: has_gpu(8))
