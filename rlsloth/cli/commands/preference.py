"""``rlsloth dpo``, ``orpo``, ``simpo``, ``kto``: one command for each preference method."""

from __future__ import annotations

from rlsloth.cli.loops import refuse_other_loops, run_loop
from rlsloth.cli.read_config import read_config
from rlsloth.losses.preference.methods import METHODS


def run(name: str, argv: list[str]) -> int:
    """Train with the method of that name. Returns the exit status."""
    refuse_other_loops(argv, name)
    config = read_config(METHODS[name].config, argv, f"rlsloth {name}")
    from rlsloth.training.preference import train

    return run_loop(name, train, config)
