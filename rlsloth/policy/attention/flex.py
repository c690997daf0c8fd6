"""Attention backend ``flex``: torch's compiled flex attention, with a block mask for the trees."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rlsloth.policy.attention.backend import Backend, has_gpu
from rlsloth.policy.attention.layout import PackedLayout


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    out = _compiled()(
        q[None],
        k[None],
        v[None],
        block_mask=packed.block_mask,
        scale=scale,
        enable_gqa=True,
        # Below 128 rows torch 2.11 would choose its decoding kernel, which fails for want of a
        # configuration.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return out[0].transpose(0, 1)


FLEX = Backend("flex", _attend, works=lambda: has_gpu(8))
