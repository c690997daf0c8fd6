"""The report of ``wrap``: modules that run on our kernels, those that do not, and the reasons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Left:
    """Modules of one class that do not run on our kernels, for one reason."""

    name: str
    """Name of the class."""
    count: int
    """Number of modules."""
    reason: str


@dataclass(frozen=True, slots=True)
class WrapReport:
    """The result of wrapping a model."""

    layers: int
    """Number of decoder layers."""
    wrapped_layers: int
    """Number of decoder layers in which at least one module is wrapped."""
    kernels: dict[str, int]
    """Kernel's name -> number of modules that run on it."""
    left: tuple[Left, ...]
    """Modules that do not run on our kernels."""

    def line(self) -> str:
        """Render the report in one line, for a run's log."""
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
        return f"{text}; not wrapped: {left}" if left else text
