"""Shared prompts by flash-attention 4 on a GPU, compared with attention in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.plain_attention import plain_backward, plain_forward
from rlsloth.data.packing import pack, to_device
from rlsloth.policy.attention.backend import Halves
from rlsloth.policy.attention.backends import available_backends
from rlsloth.policy.attention.fa4 import FA4
from rlsloth.policy.attention.kept import _part
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.attention.shared_prompts import backward, forward
from rlsloth.records import Group, MicroBatch, Prompt, Rollout

TREES = [(1, [79, 81]), (127, [300]), (700, [1, 300, 81, 79]), (129, [2, 2]), (257, [640])]
"""Tokens of each prompt, and of its completions: below, at and above the kernels' tiles."""


def stream() -> MicroBatch:
    groups = []
    for g, (prompt, lengths) in enumerate(TREES):
        rollouts = [
            Rollout(
                [7] * (n + 1), [True] * (n + 1), [0.0] * (n + 1), [0] * (n + 1), "length", "", []
            )
            for n in lengths
        ]
        groups.append(Group(Prompt(g, "", {}), [7] * prompt, rollouts))
    (micro,) = pack(groups, 10**6, mask_truncated=False, keep_zero_advantage=True).microbatches
    return to_device(micro, torch.device("cuda"))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2), (7, 1)])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_values_and_gradients(width: int, heads: int, key_heads: int, dtype: torch.dtype) -> None:
    if "fa4" not in available_backends():
        pytest.skip("flash-attention 4 is not installed")
    assert FA4.halves is not None
    packed = PackedLayout(stream(), "fa4")
    assert packed.shared is not None
    total = int(packed.cu_q[-1])
    generator = torch.Generator("cuda").manual_seed(0)

    def random(count: int) -> Tensor:
        return torch.randn(total, count, width, generator=generator, device="cuda").to(dtype)

    q, k, v, grad = (random(n) for n in (heads, key_heads, key_heads, heads))
    scale = width**-0.5
    exact = Halves(plain_forward, plain_backward)
    wide_q, wide_k, wide_v = (x.float() for x in (q, k, v))
    want, want_sums = forward(exact, wide_q, wide_k, wide_v, packed, scale)
    want_grads = backward(
        exact, packed, scale, grad.float(), wide_q, wide_k, wide_v, want, want_sums
    )
    out, sums = forward(FA4.halves, q, k, v, packed, scale)
    rounding = 8e-3 if dtype == torch.bfloat16 else 1e-3
    assert error(out, want) < rounding
    assert (sums - want_sums).abs().max() < 1e-2
    for parts in {1, key_heads}:
        pieces = []
        for part in range(parts):
            some = [_part(x, 1, part, parts) for x in (grad, q, k, v, out)]
            of_sums = _part(sums, 0, part, parts)
            pieces.append(backward(FA4.halves, packed, scale, *some, of_sums))  # type: ignore[call-arg]
        for each, expected in zip(zip(*pieces, strict=True), want_grads, strict=True):
            assert error(torch.cat(each, 1), expected) < 2 * rounding
