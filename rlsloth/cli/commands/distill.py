"""``rlsloth distill``: sample a teacher, keep what the rewards verify, train a student on it."""

from __future__ import annotations

from rlsloth.cli.loops import refuse_other_loops
from rlsloth.cli.read_config import read_config
from rlsloth.config.distill import DistillConfig


def run(name: str, argv: list[str]) -> int:
    """Distil. Returns the exit status."""
    refuse_other_loops(argv, name)
    config = read_config(DistillConfig, argv, f"rlsloth {name}")
    from rlsloth.distillation.pipeline import distill

    distill(config)
    return 0
