"""``rlsloth grpo``: reinforcement learning from rewards."""

from __future__ import annotations

from rlsloth.cli.loops import read_loop, run_loop
from rlsloth.config import GrpoConfig
from rlsloth.losses.opening import open_loss


def run(name: str, argv: list[str]) -> int:
    """Train. Returns the exit status."""
    config = read_loop(name, GrpoConfig, argv)
    open_loss(config.loss)  # refuses a mistake at once, before an import that takes seconds
    from rlsloth.api.loops import grpo

    return run_loop(name, grpo, config)
