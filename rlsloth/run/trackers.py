"""Optional trackers by name. Each package is loaded only when asked for; metrics.jsonl is written
in any case."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rlsloth.errors import UserError
from rlsloth.files import flatten


class Tracker(Protocol):
    """Where metrics go besides the run folder."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record finite values of one step."""

    def close(self) -> None:
        """Flush and end."""


Config = Mapping[str, Any]


def open_trackers(names: Sequence[str], folder: Path, config: Config) -> list[Tracker]:
    """Start the trackers, in the order of their names; a resumed run goes on in the same place.

    Project names come from each tool's own environment variables, else ``rlsloth``.

    Raises:
        UserError: a package is missing; the message has the command that installs it.
    """
    return [_KINDS[name](folder, config) for name in names]


def _require(module: str, tracker: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--run.trackers {tracker} needs a package that is not installed ({error}); "
            f"run: pip install {package}"
        ) from error


class TensorBoard:
    """Event files in the run folder: ``tensorboard --logdir runs``."""

    name = "tensorboard"

    def __init__(self, folder: Path, config: Config) -> None:
        _require("tensorboard", self.name, "tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"))
        text = "\n".join(f"    {key}: {value}" for key, value in flatten(config).items())
        self._writer.add_text("config", text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases. Its own settings (WANDB_MODE=offline, ...) hold."""

    name = "wandb"

    def __init__(self, folder: Path, config: Config) -> None:
        wandb = _require("wandb", self.name, "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rlsloth"),
            name=folder.name,
            # The same folder is the same run, also after a resume.
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME hold."""

    name = "mlflow"

    def __init__(self, folder: Path, config: Config) -> None:
        self._mlflow = _require("mlflow", self.name, "mlflow")
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
        # MLflow allows letters, digits and _-./ and blanks: pass@8 becomes pass_8.
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """Trackio, local unless TRACKIO_SPACE_ID says otherwise."""

    name = "trackio"

    def __init__(self, folder: Path, config: Config) -> None:
        self._trackio = _require("trackio", self.name, "trackio")
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


_KINDS: dict[str, Callable[[Path, Config], Tracker]] = {
    kind.name: kind for kind in (TensorBoard, Wandb, MLflow, Trackio)
}
