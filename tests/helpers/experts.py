"""Small models of experts, and counts of their grouped products."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FAMILIES = ("qwen3_moe", "gpt_oss")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
LAYERS = 2


def eager(model: Any) -> Any:
    """A copy that loops over experts."""
    twin = copy.deepcopy(model)
    twin.get_base_model().set_experts_implementation("eager")
    return twin


class GroupedProducts(TorchDispatchMode):
    """Counts grouped products by the dimensions of the second factor: a stack of weights has 3,
    the gradients in the product that gives a weight's gradient have 2."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.empty_groups = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            self.counts[args[1].dim()] += 1
            offsets = args[2]
            self.empty_groups += int((offsets.diff() == 0).sum())
        return func(*args, **(kwargs or {}))
