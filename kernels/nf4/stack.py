"""Stack NF4 weights that were quantised one by one, so that one kernel multiplies them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlsloth.kernels.nf4.op import NESTED_BLOCK, Nf4Weight


def can_stack(weights: Sequence[Nf4Weight]) -> bool:
    """Whether one kernel can read the weights as one.

    Their rows must be whole blocks, and all but the last must have whole nested blocks.
    """
    first = weights[0]
    same = all(
        w.shape[1] == first.shape[1]
        and w.blocksize == first.blocksize
        and w.dtype == first.dtype
        and (w.code_256 is None) == (first.code_256 is None)
        for w in weights
    )
    if not same or first.shape[1] % first.blocksize:
        return False
    if first.code_256 is None:
        return True
    whole = all(w.absmax.numel() % NESTED_BLOCK == 0 for w in weights[:-1])
    return whole and all(
        w.code_256 is not None and torch.equal(w.code_256, first.code_256) for w in weights
    )


@torch.no_grad()
def stack(parameters: Sequence[Any]) -> Nf4Weight:
    """Move bitsandbytes ``Params4bit`` [O_i, I] into one storage; return it as [sum O_i, I].

    The parameters become views of that storage and keep their values, bit for bit. They must
    satisfy ``can_stack``.
    """
    weights = [Nf4Weight.of(parameter) for parameter in parameters]
    states = [parameter.quant_state for parameter in parameters]
    packed_B, packed_parts = _joined([w.packed_B for w in weights])
    absmax, absmax_parts = _joined([w.absmax for w in weights])
    for parameter, state, packed, part in zip(
        parameters, states, packed_parts, absmax_parts, strict=True
    ):
        parameter.data = packed.view(parameter.dtype).view(parameter.shape)
        state.absmax = part
    absmax2 = offset = None
    if weights[0].code_256 is not None:
        absmax2, absmax2_parts = _joined([state.state2.absmax for state in states])
        for state, part in zip(states, absmax2_parts, strict=True):
            state.state2.absmax = part
        offset = torch.cat([state.offset.view(1).expand(state.shape[0]) for state in states])
    rows = sum(w.shape[0] for w in weights)
    return replace(
        weights[0],
        packed_B=packed_B,
        absmax=absmax,
        absmax2=absmax2,
        offset=offset,
        shape=(rows, weights[0].shape[1]),
    )


def _joined(parts: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Concatenate vectors; return the result, and each vector as a view of it."""
    joined = torch.cat(list(parts))
    return joined, torch.split(joined, [len(part) for part in parts])
