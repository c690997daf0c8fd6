"""Adapters in vLLM's layers: one at a time, in slots that CUDA graphs read.

vLLM's own LoRA serves many adapters at once, picked by token: two kernels a layer that read each
token's choice, a copy of every adapter, files, and ranks from a list. Here all tokens have the
same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsloth.errors import UserError


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapted linear of the trainer."""

    path: str
    """Its module's name in the PEFT model."""
    rank: int
    scale: float
    """Of ``B A``: alpha / rank, or as PEFT was configured."""


@dataclass(slots=True)
class Part:
    """Where in a slot the adapter of one linear lies."""

    adapted: Adapted
    a_RI: Tensor  # noqa: N815 -- fields carry shape suffixes too
    b_OR: Tensor  # noqa: N815


class Slot:
    """What a layer of vLLM adds: ``x A^T B^T`` of all the linears that it fuses.

    Their A lie below each other; B is block-diagonal, [O, sum of ranks].
    """

    def __init__(
        self, adapted: Sequence[Adapted | None], outs: Sequence[int], into: int, like: Tensor
    ) -> None:
        ranks = [0 if a is None else a.rank for a in adapted]
        self.used = False
        """Whether vLLM has computed with it."""
        self.a_RI = like.new_zeros(sum(ranks), into)
        self.b_OR = like.new_zeros(sum(outs), sum(ranks))
        self.parts: list[Part] = []
        row = column = 0
        for a, rank, out in zip(adapted, ranks, outs, strict=True):
            if a is not None:
                b_OR = self.b_OR[row : row + out, column : column + rank]
                self.parts.append(Part(a, self.a_RI[column : column + rank], b_OR))
            row, column = row + out, column + rank

    def add(self, x_MI: Tensor, out_MO: Tensor) -> Tensor:
        """``out += x A^T B^T``, in place."""
        self.used = True
        low_MR = x_MI @ self.a_RI.t()
        return out_MO.addmm_(low_MR.to(out_MO.dtype), self.b_OR.t().to(out_MO.dtype))


def adapted_linears(model: Any) -> dict[int, Adapted]:
    """The linears of a PEFT model that its active adapter is on, by their weight's address."""
    from peft.tuners.lora import LoraLayer

    name = model.active_adapter
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            weight = module.get_base_layer().weight
            rank = module.lora_A[name].weight.shape[0]
            found[weight.data_ptr()] = Adapted(path, rank, float(module.scaling[name]))
    return found


@torch.no_grad()
def fill(slots: Iterable[Slot], tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter into the slots, B times its scale.

    Raises:
        UserError: some tensor has no place there: vLLM would sample without it.
    """
    left = {_plain_name(name): p.detach() for name, p in tensors.items()}
    parts = [part for slot in slots for part in slot.parts]
    given = []
    for part in parts:
        for kind in "AB":
            name = f"{part.adapted.path}.lora_{kind}.weight"
            if name not in left:
                raise UserError(f"the adapter has no {name}")
            given.append(left.pop(name))
    if left:
        raise UserError(f"vLLM has no place for the adapter's {min(left)} ({len(left)} tensors)")
    scaled = torch._foreach_mul(given[1::2], [part.adapted.scale for part in parts])
    torch._foreach_copy_([part.a_RI for part in parts], given[0::2])
    torch._foreach_copy_([part.b_OR for part in parts], scaled)


@torch.no_grad()
def clear(slots: Iterable[Slot]) -> None:
    """Let the layers be the base's."""
    # A as well: it may hold a number that is not finite.
    torch._foreach_zero_([x for slot in slots for x in (slot.a_RI, slot.b_OR)])


def _plain_name(name: str) -> str:
    """The name a tensor has in a saved adapter: without the adapter's own name."""
    return re.sub(r"\.(lora_(?:embedding_)?[AB])\.[^.]+", r".\1", name)
