"""The parts of a memory plan: its rows, their sums by phase, and the key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30

Precision = Literal["nf4", "bf16", "fp16", "fp32"]
Phase = Literal["rollout", "update"]


@dataclass(frozen=True, slots=True)
class Term:
    """One row of the table."""

    name: str
    rollout: int
    """Bytes while rollouts are sampled."""
    update: int
    """Bytes while the policy is updated."""
    moment: bool = False
    """Whether the memory is needed for a moment only: of such rows the largest counts."""
    loaded: bool = False
    """Whether the memory is allocated once the model and its adapter are loaded."""


@dataclass(frozen=True, slots=True)
class Cache:
    """The key-value cache with which an engine is started."""

    size: int
    """Bytes of the cache; of one completion if not even one fits."""
    asked: int
    """Number of completions to decode at once if they fit."""
    holds: int
    """Number of completions of the longest length that fit at once; 0 if none fits."""
    context: int
    """Number of tokens of the longest prompt with its completion."""
    stays: bool = False
    """Whether the cache is kept while the policy is updated."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of a run on one GPU."""

    engine: str | None
    """Value of ``rollout.engine``; None if nothing is sampled."""
    terms: tuple[Term, ...]
    total: int
    """Bytes of the GPU."""
    cache: Cache | None = None
    """Cache whose size the plan decides; None for engines without one.

    The embedded engine's cache is a term.
    """
    host: int = 0
    """Bytes of host memory for activations, the embedding and layers' weights."""
    host_total: int | None = None
    """Bytes of host memory that may be used for them; None if unknown."""

    def peak(self, phase: Phase, *, to_come: bool = False) -> int:
        """Sum the bytes at the peak of a phase.

        Args:
            phase: rollout or update.
            to_come: leave out rows that are ``loaded``.
        """
        sizes = [
            (t.update if phase == "update" else t.rollout, t.moment)
            for t in self.terms
            if not (to_come and t.loaded)
        ]
        held = sum(size for size, moment in sizes if not moment)
        return held + max((size for size, moment in sizes if moment), default=0)

    @property
    def left(self) -> int:
        """Bytes that are free at the run's peak; negative if the run does not fit."""
        return self.total - max(self.peak("rollout"), self.peak("update"))

    @property
    def fits(self) -> bool:
        """Whether both phases fit the GPU, and activations the host."""
        return self.left >= 0 and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether the host has room for the activations that leave the GPU."""
        return self.host_total is None or self.host <= self.host_total


def element_size(precision: Precision) -> int:
    """Return the bytes of an element of the compute type."""
    return 4 if precision == "fp32" else 2
