"""The rows of a memory plan, their sums, and the key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30

Precision = Literal["nf4", "bf16", "fp32"]
Phase = Literal["rollout", "update"]


@dataclass(frozen=True, slots=True)
class Term:
    """One row of the table; bytes in each phase, 0 where it is not held then."""

    name: str
    rollout: int
    update: int
    moment: bool = False
    """Whether it is held for a moment only: a phase needs the largest of these terms, not their
    sum."""
    loaded: bool = False
    """Whether it is allocated as soon as the model and its adapter are loaded."""


@dataclass(frozen=True, slots=True)
class Cache:
    """The key-value cache that an engine is started with."""

    size: int
    """Bytes."""
    asked: int
    """Completions to decode at once if they fit."""
    holds: int
    """Completions of the longest length that fit; 0 where the GPU has no room for one: ``size`` is
    then that of one."""
    context: int
    """Tokens of the longest prompt and completion."""
    stays: bool = False
    """Whether it is also held while the policy is updated."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of a run on one GPU."""

    engine: str | None
    """Value of ``rollout.engine``; None where nothing is sampled."""
    terms: tuple[Term, ...]
    total: int
    """Bytes of the GPU."""
    cache: Cache | None = None
    """None where the engine has no cache that the plan sizes; the embedded engine's slots are a
    term."""

    def peak(self, phase: Phase, *, to_come: bool = False) -> int:
        """Bytes at the phase's fullest moment; with ``to_come`` without the terms ``loaded``."""
        sizes = [
            (t.update if phase == "update" else t.rollout, t.moment)
            for t in self.terms
            if not (to_come and t.loaded)
        ]
        held = sum(size for size, moment in sizes if not moment)
        return held + max((size for size, moment in sizes if moment), default=0)

    @property
    def left(self) -> int:
        """Bytes free at the run's fullest moment; negative where it does not fit."""
        return self.total - max(self.peak("rollout"), self.peak("update"))

    @property
    def fits(self) -> bool:
        """Whether both phases fit the GPU."""
        return self.left >= 0


def element_size(precision: Precision) -> int:
    """Bytes an element of the compute type."""
    return 4 if precision == "fp32" else 2
