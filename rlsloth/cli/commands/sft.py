"""``rlsloth sft``: supervised fine-tuning on the completions of a dataset."""

from __future__ import annotations

from rlsloth.cli.loops import read_loop, run_loop
from rlsloth.config.sft import SftConfig


def run(name: str, argv: list[str]) -> int:
    """Train. Returns the exit status."""
    config = read_loop(name, SftConfig, argv)
    from rlsloth.api.loops import sft

    return run_loop(name, sft, config)
