"""What was wrapped, what was not, and why, in plain words."""

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
    """What ``wrap`` did to a model."""

    layers: int
    """Decoder layers of the model."""
    wrapped_layers: int
    """Those in which something is wrapped."""
    kernels: dict[str, int]
    """Kernel -> modules that run on it."""
    left: tuple[Left, ...]

    def line(self) -> str:
        """For the log of a run."""
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
