"""Experiment trackers by name: TensorBoard, W&B, MLflow, Trackio.

A tracker is one class with an entry in `TRACKERS`. Its package is imported only when
``run.trackers`` names it. metrics.jsonl is written whether or not there are trackers.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rlsloth.errors import UserError, first_line, nearest
from rlsloth.files import flatten

Config = Mapping[str, Any]
"""A run's configuration as nested plain values."""


class Tracker(Protocol):
    """A service or folder that gets a run's metrics besides metrics.jsonl."""

    name: ClassVar[str]
    """Name of the tracker in ``run.trackers``, and of the Python package that it needs."""
    remedy: ClassVar[str]
    """Advice for a tracker that cannot start."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Start, or go on where a resumed run stopped; ``folder`` is the run folder.

        Project names come from each tool's own environment variables, else ``rlsloth``.

        Raises:
            ImportError: the package is not installed.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, all of them finite."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard(Tracker):
    """Event files in the run folder: ``tensorboard --logdir runs``."""

    name = "tensorboard"
    remedy = "check that files can be written in the run folder"

    def __init__(self, folder: Path, config: Config) -> None:
        importlib.import_module("tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"))
        text = "\n".join(f"    {key}: {value}" for key, value in flatten(config).items())
        self._writer.add_text("config", text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb(Tracker):
    """Weights & Biases, with its own environment variables (WANDB_MODE=offline, ...)."""

    name = "wandb"
    remedy = "run wandb login, or set WANDB_MODE=offline"

    def __init__(self, folder: Path, config: Config) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rlsloth"),
            name=folder.name,
            # One folder is one run, also after a resume.
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """MLflow, with its own variables MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

    name = "mlflow"
    remedy = "check MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME"

    def __init__(self, folder: Path, config: Config) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            self._mlflow.set_experiment("rlsloth")
        memo = folder / "mlflow_run_id.txt"
        resumed = memo.read_text().strip() if memo.exists() else None
        run = self._mlflow.start_run(run_id=resumed, run_name=None if resumed else folder.name)
        if resumed is None:
            memo.write_text(run.info.run_id)
            # MLflow refuses to change a parameter, so they are sent once.
            self._mlflow.log_params(flatten(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # MLflow allows letters, digits, spaces and _-./ in names: pass@8 becomes pass_8.
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio(Tracker):
    """Trackio, which stays on this machine unless TRACKIO_SPACE_ID is set."""

    name = "trackio"
    remedy = "check TRACKIO_PROJECT and TRACKIO_SPACE_ID"

    def __init__(self, folder: Path, config: Config) -> None:
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "rlsloth"),
            name=folder.name,
            config=dict(config),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {
    tracker.name: tracker for tracker in (TensorBoard, Wandb, MLflow, Trackio)
}
"""Name in ``run.trackers`` -> tracker."""


def check_trackers(names: Sequence[str]) -> None:
    """Check the names in ``run.trackers``.

    Raises:
        UserError: there is no tracker of that name; the message has the nearest one.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"--run.trackers {name}: no such tracker{nearest(name, TRACKERS)} "
                f"(known: {', '.join(TRACKERS)})"
            )


def open_trackers(names: Sequence[str], folder: Path, config: Config) -> list[Tracker]:
    """Start the trackers of a run, in the order of their names.

    Raises:
        UserError: a tracker's package is missing, or it cannot start; the message has the remedy.
    """
    opened: list[Tracker] = []
    try:
        opened.extend(_open(name, folder, config) for name in names)
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def _open(name: str, folder: Path, config: Config) -> Tracker:
    try:
        return TRACKERS[name](folder, config)
    except ImportError as error:
        raise UserError(
            f"--run.trackers {name} needs a package that is not installed ({error}); "
            f"run: pip install {name}"
        ) from error
    except (Exception, SystemExit) as error:
        remedy = getattr(TRACKERS[name], "remedy", "read the tracker's documentation")
        raise UserError(
            f"--run.trackers {name}: it cannot start ({first_line(error)}); {remedy}, or leave the "
            "tracker out: metrics.jsonl is always written"
        ) from error
