"""The reward section."""

from __future__ import annotations

from pydantic import Field

from rlsloth.config.section import Params, Section


class RewardConfig(Section):
    """How rewards are run."""

    weights: list[float] | None = None
    """One per reward; default 1 each."""
    params: dict[str, Params] = {}
    """Keyword arguments by reward name, e.g. {length: {target: 200}}."""
    workers: int = Field(2, ge=1)
    """Processes that score at the same time."""
    cpu_seconds: float = Field(5.0, gt=0, le=86400)
    """CPU time one completion may take; then its worker is killed and the failure counted."""
    wall_seconds: float = Field(60.0, gt=0, le=86400)
    """Wall-clock backstop for one completion (a reward that sleeps or waits)."""
    memory_gb: float = Field(4.0, gt=0, le=65536)
    """Address space a worker may take."""
