"""The run section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsloth.config.section import Folder, Section


class RunConfig(Section):
    """Where results go."""

    dir: Folder | None = None
    """Run folder; default runs/<date>-<time>-<model>. An existing run needs --run.resume."""
    resume: bool = False
    """Continue the run in dir from its newest sound checkpoint."""
    save_every: int = Field(25, ge=0)
    """Checkpoint every this many steps; 0: only at the end."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Also log to these; metrics.jsonl is always written."""
    show_samples: int = Field(2, ge=0)
    """Completions printed at each step."""
