"""The section ``reward``."""

from __future__ import annotations

from pydantic import Field

from rlsloth.config.section import Params, Section


class RewardConfig(Section):
    """Weights, parameters and limits of rewards."""

    weights: list[float] | None = None
    """Weight of each reward in their sum, in the order of rewards; default: 1 each."""
    params: dict[str, Params] = {}
    """Keyword arguments of each reward by its name, e.g. {length: {target: 200}}."""
    workers: int = Field(default=2, ge=1)
    """Processes that score at the same time."""
    cpu_seconds: float = Field(default=5.0, gt=0, le=86400)
    """Most CPU seconds for one completion; beyond them the process is killed and a failure
    counted."""
    wall_seconds: float = Field(default=60.0, gt=0, le=86400)
    """Most wall-clock seconds for one completion, for rewards that sleep or wait."""
    pass_env: list[str] = []
    """Environment variables that rewards see although their names look like a key's or a token's,
    e.g. OPENAI_API_KEY; all other such variables are hidden from them."""
    memory_gb: float = Field(default=4.0, gt=0, le=65536)
    """Largest address space of a process in GiB."""
