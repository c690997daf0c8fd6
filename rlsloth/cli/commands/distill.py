"""``rlsloth distill``: sample a teacher, keep the verified traces, train a student on them."""

from __future__ import annotations

from rlsloth.cli.loops import refuse_other_loops
from rlsloth.cli.read_config import read_config
from rlsloth.config.distill import DistillConfig
from rlsloth.run.trackers import check_trackers


def run(name: str, argv: list[str]) -> int:
    """Distil. Returns the exit status."""
    refuse_other_loops(argv, name)
    config = read_config(DistillConfig, argv, f"rlsloth {name}")
    check_trackers(config.student.run.trackers)
    from rlsloth.api.models import distill

    distill(config)
    return 0
