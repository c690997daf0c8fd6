"""``rlsloth grpo``: reinforcement learning from rewards."""

from __future__ import annotations

from rlsloth.cli.loops import refuse_other_loops, run_loop
from rlsloth.cli.read_config import read_config
from rlsloth.config import GrpoConfig
from rlsloth.losses.opening import open_loss


def run(name: str, argv: list[str]) -> int:
    """Train. Returns the exit status."""
    refuse_other_loops(argv, name)
    config = read_config(GrpoConfig, argv, f"rlsloth {name}")
    open_loss(config.loss)  # refuses a mistake at once: the next import takes seconds
    from rlsloth.training.grpo import train

    return run_loop(name, train, config)
