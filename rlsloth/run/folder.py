"""The run folder: make or reopen it, lock it, and find the files in it.

config.yaml        the settings as the user set them; pass it with --run.resume to continue the run
plan.json          the settings that the memory plan decided on this machine
environment.json   versions, device and command line
metrics.jsonl      one JSON object a step, and one an evaluation
samples/           step_00001.parquet, ...
log.txt            every message, with its time
summary.json       the run's result, once it has finished
report.html        all of it on one page
checkpoints/       the newest ones, to resume from
adapter/           the trained adapter, once the run has finished
model/             in its place the whole model, if its own weights were trained
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from rlsloth.config import ModelConfig, RunConfig, TrainingConfig
from rlsloth.errors import UserError
from rlsloth.files import sweep, write_atomically
from rlsloth.run.json_lines import json_lines, read_json_lines
from rlsloth.run.locking import LockedError, lock
from rlsloth.run.saved_config import Changes, changed_settings, save_config

LOCK = ".lock"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples"
SUMMARY = "summary.json"
LOG = "log.txt"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in order, without a last line that a crash left incomplete.

    Raises:
        UserError: a line before the last one is damaged.
    """
    return list(read_json_lines(folder / METRICS, _row, "repair or delete the line"))


def _row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        raise ValueError("not a JSON object with an integer step")
    return value


def rewrite_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace metrics.jsonl atomically."""
    write_atomically(folder / METRICS, json_lines(rows))


def sample_file(folder: Path, step: int) -> Path:
    """The path of a step's samples."""
    return folder / SAMPLES / f"step_{step:05d}.parquet"


def sample_files(folder: Path) -> dict[int, Path]:
    """The sample files by step, in order; files with other names are ignored."""
    found = {
        int(match[1]): path
        for path in (folder / SAMPLES).glob("step_*.parquet")
        if (match := re.fullmatch(r"step_(\d+)", path.stem))
    }
    return dict(sorted(found.items()))


def open_folder(run: RunConfig, model: ModelConfig, root: Path) -> tuple[Path, IO[str]]:
    """Find or make the run folder and lock it; remove what killed writers left in it.

    Returns:
        The folder and the open lock file; closing the file releases the folder.

    Raises:
        UserError: the folder holds a run and ``resume`` is off, or holds none and it is on, or
            another process that still runs writes to it.
    """
    if run.dir is None:
        if run.resume:
            raise UserError("--run.resume needs --run.dir, the folder of the run to continue")
        folder = _new_folder(root, model.path)
        return folder, _lock(folder)
    folder = run.dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run.dir {folder} is a file: pass a folder")
    if run.resume and not (folder / CONFIG).exists():
        raise UserError(f"no run in {folder} to resume: leave out --run.resume to start one there")
    folder.mkdir(parents=True, exist_ok=True)
    held = _lock(folder)
    # A run that failed before it logged anything leaves nothing worth keeping: start it again.
    if not run.resume and (folder / METRICS).exists():
        held.close()
        raise UserError(
            f"{folder} already holds a run; continue it with --run.resume, "
            "or pass another folder with --run.dir"
        )
    for place in (folder, folder / SAMPLES):
        sweep(place)
    return folder, held


def drop_after(folder: Path, step: int, *, evaluation: bool) -> None:
    """Delete metrics and samples of later steps, and the summary of an earlier end.

    Args:
        evaluation: whether the evaluation after ``step`` is dropped, too.
    """
    rows = [
        row
        for row in read_rows(folder)
        if row["step"] <= step and not (evaluation and row["step"] == step and _is_evaluation(row))
    ]
    rewrite_rows(folder, rows)
    (folder / SUMMARY).unlink(missing_ok=True)
    for at, path in sample_files(folder).items():
        if at > step:
            path.unlink()


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return all(name == "step" or name.startswith("eval_") for name in row)


def _new_folder(root: Path, model: str) -> Path:
    stem = Path(model.rstrip("/")).name.removesuffix(".gguf") or "model"
    base = f"{datetime.now():%Y%m%d-%H%M%S}-{stem}"
    root.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:
        folder = root / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            attempt += 1
        else:
            return folder


def _lock(folder: Path) -> IO[str]:
    try:
        return lock(folder / LOCK)
    except LockedError as error:
        raise UserError(
            f"{folder} is in use by process {error.owner}: wait for it, stop it, or pass another "
            "--run.dir"
        ) from None


def write_config(folder: Path, cfg: TrainingConfig) -> None:
    """Save the configuration with this folder as its ``run.dir`` and with ``run.resume`` off, which
    each resume has to set again."""
    values = cfg.model_dump(mode="json")
    values["run"] |= {"dir": str(folder), "resume": False}
    save_config(folder / CONFIG, values)


def config_changes(folder: Path, cfg: TrainingConfig) -> Changes:
    """Settings that a resumed run changes, except ``run.dir`` and ``run.resume``.

    Raises:
        UserError: the saved configuration is damaged.
    """
    remedy = "repair it, or start a new run with another --run.dir"
    changes = changed_settings(folder / CONFIG, cfg, remedy)
    return {k: v for k, v in changes.items() if k not in ("run.dir", "run.resume")}
