"""The linear layers of a model in 4 bits, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Quantised:
    """The model's linear layers in 4 bits, and what that costs."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Name of a weight -> its tensors in a checkpoint, by the ends of their names."""
    original: dict[str, Tensor] = field(default_factory=dict)
    """Name of a weight -> the weight in 16 bits, in host memory."""
    kept: list[str] = field(default_factory=list)
    """Names of weights that are kept in 16 bits."""
    nearest: float = 0.0
    """Divergence from the original with the nearest codes, as loading with nf4 makes them; nats a
    token."""
    chosen: float = 0.0
    """Divergence with the chosen codes, and with layers kept."""
