"""The factor of the loss that keeps small gradients within float16's range.

Gradients below 6e-8 are 0 in float16. The loss is multiplied by a power of two, and the gradients
of the trained weights, which are in float32, are divided by it again, which is exact (Micikevicius
et al. 2018, Mixed Precision Training; the constants are those of ``torch.amp.GradScaler``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FIRST = 2.0**16
"""The factor of the first update."""
MOST = 2.0**24
"""The largest factor: beyond it, gradients of 1 would be infinite in float16 after a few layers."""
PATIENCE = 2000
"""Number of updates in a row with finite gradients after which the factor is doubled."""


class LossScale:
    """The loss's factor, which is halved when a gradient overflows; always 1 in other types."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._moves = dtype == torch.float16
        self.value = FIRST if self._moves else 1.0
        self._good = 0

    def times(self, loss: Tensor) -> Tensor:
        """Multiply a loss."""
        return loss * self.value if self._moves else loss

    def divide(self, weights: Iterable[Tensor]) -> None:
        """Divide the gradients of trained weights."""
        found = [w.grad for w in weights if w.grad is not None] if self._moves else []
        if found:
            torch._foreach_mul_(found, 1 / self.value)

    def update(self, *, finite: bool) -> None:
        """Adapt the factor after a step, by whether its gradients were finite."""
        if not self._moves:
            return
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self._good == PATIENCE:
            self.value, self._good = min(self.value * 2, MOST), 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores; empty if the factor is always 1."""
        return {"factor": self.value, "good": self._good} if self._moves else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Load the result of ``state``."""
        if self._moves and state:
            self.value, self._good = float(state["factor"]), int(state["good"])
