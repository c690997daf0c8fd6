"""``rlsloth eval``: avg@k, pass@k and maj@k of a model, and of an adapter, on held-out problems."""

from __future__ import annotations

from rlsloth.cli.loops import read_loop
from rlsloth.config import GrpoConfig

ABOUT = """Measure avg@k, pass@k and maj@k of a model, with and without an adapter, on held-out
problems. Writes eval.json into a new run folder.

The options are those of rlsloth grpo: pass the config.yaml of a run to evaluate its adapter."""


def run(name: str, argv: list[str]) -> int:
    """Evaluate. Returns the exit status."""
    config = read_loop(name, GrpoConfig, argv, loop="grpo", about=ABOUT)
    from rlsloth.api.evaluate import evaluate

    evaluate(config)
    return 0
