"""The adapter in vLLM's layers: one at a time, in slots that CUDA graphs read.

vLLM's own LoRA serves many adapters at once: each token may use a different one, which needs two
more kernels a layer, a copy of each adapter, files, and ranks from a fixed list. Here all tokens
use the same adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlsloth.errors import UserError
from rlsloth.policy.whole import WholeModel


@dataclass(frozen=True, slots=True)
class Adapted:
    """A linear layer of the trainer that has an adapter."""

    path: str
    """Name of its module in the PEFT model."""
    rank: int
    scale: float
    """Factor of ``B A``: alpha / rank, or as PEFT was configured."""


@dataclass(slots=True)
class Part:
    """The part of a slot that holds one linear layer's adapter."""

    adapted: Adapted
    a_RI: Tensor  # noqa: N815 -- fields carry shape suffixes too
    """View of the slot's A: [rank, inputs]."""
    b_OR: Tensor  # noqa: N815
    """View of the slot's B: [outputs, rank]."""


class Slot:
    """The adapter of one layer of vLLM, which may fuse several linear layers: ``x A^T B^T``.

    A [sum of ranks, inputs] stacks their A; B [outputs, sum of ranks] is block-diagonal.
    """

    def __init__(
        self, adapted: Sequence[Adapted | None], outs: Sequence[int], into: int, like: Tensor
    ) -> None:
        """Make an empty slot, which adds zero.

        Args:
            adapted: the fused linear layers; None for one without an adapter.
            outs: outputs of each.
            into: inputs, which they share.
            like: tensor of the adapter's type on its device.
        """
        ranks = [0 if a is None else a.rank for a in adapted]
        self.used = False
        """Whether vLLM has called ``add``."""
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
        """Add ``x A^T B^T`` to ``out`` in place."""
        self.used = True
        low_MR = x_MI @ self.a_RI.t()
        return out_MO.addmm_(low_MR.to(out_MO.dtype), self.b_OR.t().to(out_MO.dtype))


@dataclass(slots=True)
class Loaded:
    """The parts of vLLM's model that follow training, known once it is loaded."""

    slots: list[Slot] = field(default_factory=list)
    """Places for the adapter."""
    copy_rest: Callable[[], None] | None = None
    """Copies the weights that vLLM does not share, such as norms; None if they do not learn."""

    def clear(self) -> None:
        """Forget vLLM's model, which keeps a reference to this."""
        self.slots.clear()
        self.copy_rest = None


def adapted_linears(model: Any) -> dict[int, Adapted]:
    """Map a weight's address to its linear layer, for those with a PEFT model's active adapter."""
    if isinstance(model, WholeModel):
        return {}
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
    """Copy an adapter into the slots; B is multiplied by its scale.

    Args:
        slots: every slot of the model.
        tensors: the adapter, by PEFT's names.

    Raises:
        UserError: a tensor is missing, or vLLM cannot apply one and would sample without it.
    """
    left = {_plain_name(name): p.detach() for name, p in tensors.items()}
    parts = [part for slot in slots for part in slot.parts]
    found = []
    for part in parts:
        for kind in "AB":
            name = f"{part.adapted.path}.lora_{kind}.weight"
            if name not in left:
                raise UserError(
                    f"the adapter has no tensor {name}, which vLLM's layers expect; pass "
                    "--rollout.engine transformers"
                )
            found.append(left.pop(name))
    if left:
        raise UserError(
            f"vLLM has no place for the adapter's {min(left)} ({len(left)} tensors); pass "
            "--rollout.engine transformers or other --lora.targets"
        )
    scaled = torch._foreach_mul(found[1::2], [part.adapted.scale for part in parts])
    torch._foreach_copy_([part.a_RI for part in parts], found[0::2])
    torch._foreach_copy_([part.b_OR for part in parts], scaled)


@torch.no_grad()
def clear(slots: Iterable[Slot]) -> None:
    """Empty the slots, so that the layers compute what the base model computes."""
    # A too: 0 times a number that is not finite is NaN.
    torch._foreach_zero_([x for slot in slots for x in (slot.a_RI, slot.b_OR)])


def _plain_name(name: str) -> str:
    """Return a tensor's name as saved adapters have it, without the adapter's own name."""
    return re.sub(r"\.(lora_(?:embedding_)?[AB])\.[^.]+", r".\1", name)
