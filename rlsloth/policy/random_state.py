"""The state of the generators that dropout draws from."""

from __future__ import annotations

import torch


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Set the generators to the result of ``random_state``."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
