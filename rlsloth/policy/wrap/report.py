"""A report of the modules that were wrapped, of those that were not, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Left:
    """Modules of one class that do not run on our kernels."""

    name: str
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class WrapReport:
    """The result of ``wrap`` on a model."""

    layers: int
    """Decoder layers of the model."""
    wrapped_layers: int
    """Decoder layers in which something is wrapped."""
    kernels: dict[str, int]
    """Kernel -> modules that run on it."""
    left: tuple[Left, ...]

    def line(self) -> str:
        """The report in one line, for a run's log."""
        reasons: dict[str, list[str]] = {}
        for one in self.left:
            reasons.setdefault(one.reason, []).append(f"{one.count} {one.name}")
        left = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        if not self.kernels:
            return f"kernels: none, all layers run on transformers' own modules ({left})"
        text = (
            f"kernels: {self.wrapped_layers} of {self.layers} layers wrapped "
            f"({', '.join(self.kernels)})"
        )
        return f"{text}; left alone: {left}" if left else text
