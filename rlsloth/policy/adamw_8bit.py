"""AdamW with states in 8 bits, by bitsandbytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlsloth.policy.host_states import HostStates
from rlsloth.policy.rounding import BLOCK, adamw_, seed_of, update_rounded


@cache
def adamw_8bit() -> Any:
    """Return the class of bitsandbytes' AdamW with states in 8 bits, without its waits.

    bitsandbytes 0.50 waits after each weight, and reads its options again for each one; an adapter
    has hundreds, whose updates take the GPU 7 us each.
    """
    from bitsandbytes.optim import AdamW8bit

    class QueuedAdamW8bit(AdamW8bit):  # type: ignore[misc]
        """AdamW with states in 8 bits (Dettmers et al. 2022), without waiting for the GPU."""

        host_states: HostStates | None = None

        def begin(self) -> None:
            """Move states of a checkpoint to their weights' device, before the first step."""
            if not self.initialized:
                self.to_gpu()
                self.initialized: bool = True

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            assert closure is None
            self.begin()
            for g, group in enumerate(self.param_groups):
                for i, weight in enumerate(group["params"]):
                    if weight.grad is None:
                        continue
                    if self.host_states is not None:
                        self.host_states.bring(weight)
                    if not (state := self.state[weight]):
                        self.init_state(group, weight, g, i)
                    if weight.dtype == torch.bfloat16:
                        state["step"] += 1
                        _update_rounded(group, weight, state, i)
                    elif state["state1"].dtype == torch.uint8 and weight.grad.is_contiguous():
                        state["step"] += 1
                        _update_8bit(group, weight, weight.grad, state)
                    else:
                        self.update_step(group, weight, g, i)

    return QueuedAdamW8bit


def _update_8bit(
    group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Any]
) -> None:
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    optimizer_update_8bit_blockwise(
        "adam",
        grad,
        weight,
        state["state1"],
        state["state2"],
        *group["betas"],
        0.0,  # the third beta and alpha belong to AdEMAMix
        0.0,
        group["eps"],
        state["step"],
        group["lr"],
        state["qmap1"],
        state["qmap2"],
        state["absmax1"],
        state["absmax2"],
        group["weight_decay"],
    )


def _update_rounded(
    group: dict[str, Any], weight: Parameter, state: dict[str, Any], index: int
) -> None:
    """Update a bfloat16 weight in float32, chunk by chunk, and round it at random.

    Args:
        group: the optimizer's group of parameters, with their options.
        weight: the weight, changed in place.
        state: its states: in 8 bits, or in float32 if it is small.
        index: its number in the group.
    """
    step = int(state["step"])
    names = [n for n in ("state1", "state2", "absmax1", "absmax2") if n in state]

    def update(values: Tensor, grad: Tensor, part: slice) -> None:
        of_blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        parts: dict[str, Any] = {
            name: state[name].view(-1)[of_blocks if name.startswith("absmax") else part]
            for name in names
        }
        if "absmax1" in parts:
            _update_8bit(group, values, grad, {**state, **parts})
        else:
            adamw_(values, grad, (parts["state1"], parts["state2"]), step, group)

    assert weight.grad is not None
    update_rounded(weight, weight.grad, update, seed_of(step, index))
