"""``rlsloth sft``: supervised fine-tuning on the completions of a dataset."""

from __future__ import annotations

from rlsloth.cli.loops import refuse_other_loops, run_loop
from rlsloth.cli.read_config import read_config
from rlsloth.config.sft import SftConfig


def run(name: str, argv: list[str]) -> int:
    """Train. Returns the exit status."""
    refuse_other_loops(argv, name)
    config = read_config(SftConfig, argv, f"rlsloth {name}")
    from rlsloth.training.sft import train

    return run_loop(name, train, config)
