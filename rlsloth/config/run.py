"""The section ``run``: the run folder, checkpoints and trackers."""

from __future__ import annotations

from pydantic import Field

from rlsloth.config.section import Folder, Section


class RunConfig(Section):
    """Run folder, checkpoints and trackers."""

    dir: Folder | None = None
    """Run folder; default runs/<date>-<time>-<model>. For a folder with a run pass --run.resume."""
    resume: bool = False
    """Continue the run in run.dir from its newest undamaged checkpoint."""
    save_every: int = Field(default=25, ge=0)
    """Steps between checkpoints; 0: only one at the end."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints kept."""
    trackers: list[str] = []
    """Trackers that also get the metrics, such as wandb; `rlsloth doctor` lists them.
    metrics.jsonl is always written."""
    show_samples: int = Field(default=2, ge=0)
    """Completions printed after each step, one a prompt."""
