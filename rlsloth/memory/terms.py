"""The rows of a memory plan, and what they add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30

Precision = Literal["nf4", "bf16", "fp32"]
Phase = Literal["rollout", "update"]
EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class Term:
    """One row of the table; bytes in each phase, 0 where it is not held then."""

    name: str
    rollout: int
    update: int
    moment: bool = False
    """Of these a phase holds only the largest at a time."""
    loaded: bool = False
    """There as soon as the model and its adapter are."""


@dataclass(frozen=True, slots=True)
class Cache:
    """The key-value cache that vLLM is given."""

    size: int
    """Bytes."""
    asked: int
    """Completions that are decoded at once if they find room."""
    holds: int
    """Of these as many find room at their longest; 0 where the GPU has no room for one: ``size`` is
    then that of one."""
    context: int
    """Tokens of the longest prompt and completion."""
    stays: bool = False
    """Whether it is held while the policy is updated, too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of a run on one GPU."""

    engine: EngineName | None
    """None where nothing is sampled."""
    terms: tuple[Term, ...]
    total: int
    """Bytes of the GPU."""
    cache: Cache | None = None
    """vLLM's; the slots of the transformers engine are a term like others."""

    def peak(self, phase: Phase, *, to_come: bool = False) -> int:
        """Bytes at the phase's fullest moment; with ``to_come`` beyond what loading takes."""
        sizes = [
            (t.update if phase == "update" else t.rollout, t.moment)
            for t in self.terms
            if not (to_come and t.loaded)
        ]
        held = sum(size for size, moment in sizes if not moment)
        return held + max((size for size, moment in sizes if moment), default=0)

    @property
    def left(self) -> int:
        """Bytes free at the fullest moment of all; negative where it does not fit."""
        return self.total - max(self.peak("rollout"), self.peak("update"))

    @property
    def fits(self) -> bool:
        """Whether both phases do."""
        return self.left >= 0


def element_size(precision: Precision) -> int:
    """Bytes an element of the compute type."""
    return 4 if precision == "fp32" else 2
