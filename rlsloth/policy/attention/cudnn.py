"""cuDNN's attention through torch, one call a sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rlsloth.policy.attention.backend import Backend, has_gpu
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.attention.repeated import keep, repeat


def _attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    """One call for each segment together with its prompt.

    A prompt's output is kept from the prompt's own segment, so the queries of its repetitions get a
    gradient of exactly 0.
    """
    streams = (repeat(q, packed, summed=False), repeat(k, packed), repeat(v, packed))
    pieces = (torch.split(s.transpose(0, 1)[None], packed.lengths, 2) for s in streams)
    # cuDNN refuses a single key; such sequences go to the next backend in the list.
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        squares = [
            scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=True)
            for a, b, c in zip(*pieces, strict=True)
        ]
    # squeeze, because [0] would give the output's gradient strides that grow with the stream: torch
    # keeps cuDNN's plans without them, and would read past the end (torch 2.11).
    return keep(torch.cat(squares, 2).squeeze(0).transpose(0, 1), packed)


CUDNN = Backend("cudnn", _attend, works=lambda: has_gpu(8))
