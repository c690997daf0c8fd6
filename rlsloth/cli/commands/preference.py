"""``rlsloth dpo``, ``orpo``, ``simpo``, ``kto``: one command for each preference method."""

from __future__ import annotations

from rlsloth.cli.loops import read_loop, run_loop
from rlsloth.losses.preference.methods import METHODS


def run(name: str, argv: list[str]) -> int:
    """Train with the method of that name. Returns the exit status."""
    config = read_loop(name, METHODS[name].config, argv)
    from rlsloth.api.loops import prefer

    return run_loop(name, prefer, config)
