"""The gradients of a step's micro-batches, computed again if the GPU's memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from rlsloth.memory.out_of_memory import free_memory
from rlsloth.memory.placing import most_frugal
from rlsloth.policy.activations.placement import describe
from rlsloth.policy.policy import Policy

Result = TypeVar("Result")


def accumulate(
    policy: Policy, compute: Callable[[], Result], warn: Callable[[str], None] = print
) -> Result:
    """Compute the gradients of a step's micro-batches, again from the first one after a failure.

    The first time that memory runs out, nothing changes but that unused memory is given back:
    another program's or fragments may have taken it. The second time, activations are placed where
    they need the least of the GPU's memory, for the rest of the run. Gradients are added up in the
    same order, so that the update is that of a run with enough memory.

    Args:
        policy: the policy; its gradients are empty.
        compute: runs forward and backward of all micro-batches. A call that fails must leave
            nothing but gradients behind.
        warn: prints a warning.

    Returns:
        The result of ``compute``.

    Raises:
        torch.OutOfMemoryError: memory ran out a third time.
    """
    state = _random_state(policy.device)
    for change in (_change_nothing, _place_frugally):
        try:
            return compute()
        except torch.OutOfMemoryError:
            pass
        # Here rather than above: the exception's traceback holds the failed call's tensors.
        policy.optimizer.zero_grad(set_to_none=True)
        free_memory()
        warn(f"GPU memory ran out in the update; its gradients are computed again{change(policy)}")
        _set_random_state(policy.device, state)
    return compute()


def _change_nothing(_: Policy) -> str:
    return ""


def _place_frugally(policy: Policy) -> str:
    policy.place(most_frugal(policy.backend, len(policy.placements)))
    return f", from now on with {describe(policy.placements)}: this is slower"


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
