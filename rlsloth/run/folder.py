"""The run folder on disk: making it, locking it, writing files so that a crash leaves the old or
the new one.

config.yaml        the resolved configuration; `rlsloth grpo config.yaml --run.resume` goes on
environment.json   versions, device and command line
metrics.jsonl      one JSON object a step, and one an evaluation
samples/           step_00001.parquet, ...
log.txt            what was said, with times
summary.json       the run's result, once it is finished
report.html        all of it on one page
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Protocol, Self

import yaml
from pydantic import ValidationError

from rlsloth.config import ModelConfig, RunConfig
from rlsloth.errors import UserError

LOCK = ".lock"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples"
SUMMARY = "summary.json"
LOG = "log.txt"


class TrainingConfig(Protocol):
    """What a run needs of a loop's configuration; every one of them is a pydantic section."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def steps(self) -> int: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, flushed to disk, then
    renamed.

    Raises:
        OSError: what the file system said; the old file, if any, is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is only durable once the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN and infinities become null, paths strings."""
    text = json.dumps(finite(value), indent=2, default=str, allow_nan=False)
    atomic_write(path, (text + "\n").encode())


def finite(value: Any) -> Any:
    """The value with every NaN and infinity replaced by None, in nested mappings and sequences
    too."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line, flushed to disk before it returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(row), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order. A last line torn by a crash is left out.

    Raises:
        UserError: another line is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    complete = lines[:-1]  # every whole line ends in a newline
    return [_row(path, at, line) for at, line in enumerate(complete, 1) if line.strip()]


def _row(path: Path, at: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise UserError(
            f"{path} line {at} is damaged: it is no JSON object with a step; repair or delete it"
        )
    return row


def rewrite_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace metrics.jsonl atomically."""
    text = "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)
    atomic_write(folder / METRICS, text.encode())


def sample_file(folder: Path, step: int) -> Path:
    """Where a step's samples are."""
    return folder / SAMPLES / f"step_{step:05d}.parquet"


def sample_files(folder: Path) -> dict[int, Path]:
    """Sample files by step, in order of steps; files with other names are not ours."""
    found = {
        int(match[1]): path
        for path in (folder / SAMPLES).glob("step_*.parquet")
        if (match := re.fullmatch(r"step_(\d+)", path.stem))
    }
    return dict(sorted(found.items()))


def open_folder(run: RunConfig, model: ModelConfig, root: Path) -> tuple[Path, IO[str]]:
    """Find or make the run folder and lock it.

    Returns:
        The folder and the open lock file; closing it gives the folder free.

    Raises:
        UserError: the folder holds a run and ``resume`` is off, or holds none and it is on, or
            another living process writes to it.
    """
    if run.dir is None:
        if run.resume:
            raise UserError("--run.resume needs --run.dir, the folder of the run to continue")
        folder = _new_folder(root, model.path)
        return folder, _lock(folder)
    folder = run.dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run folder {folder} is a file; give another --run.dir")
    if run.resume and not (folder / CONFIG).exists():
        raise UserError(f"no run in {folder} to resume; leave out --run.resume to start one there")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    # A start that failed before its first figure leaves nothing worth keeping, and may be repeated.
    if not run.resume and (folder / METRICS).exists():
        lock.close()
        raise UserError(
            f"{folder} already holds a run; continue it with --run.resume, "
            "or give another folder with --run.dir"
        )
    return folder, lock


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
    """Take the folder for this process. The kernel releases the lock when the process ends, however
    it ends."""
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open for the whole run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{folder} is in use by process {owner}; "
            "wait for it, stop it, or give another --run.dir"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def write_config(folder: Path, cfg: TrainingConfig) -> None:
    """Save the resolved configuration, loadable as a YAML file of the same command.

    Its ``run.dir`` is this folder and ``run.resume`` is off, so that continuing it is asked for
    each time.
    """
    new = cfg.model_dump(mode="json")
    new["run"] |= {"dir": str(folder), "resume": False}
    text = yaml.safe_dump(new, sort_keys=False, allow_unicode=True, width=100)
    atomic_write(folder / CONFIG, text.encode("utf-8"))


def config_changes(folder: Path, cfg: TrainingConfig) -> dict[str, tuple[object, object]]:
    """What a configuration changes of the one that is saved in the folder.

    Returns:
        (old, new) by dotted key, as YAML has the values; None where a mapping lacks a key.
        ``run.dir`` and ``run.resume`` are no settings of the run itself and left out.

    Raises:
        UserError: the saved configuration is damaged.
    """
    path = folder / CONFIG
    try:
        saved = type(cfg).model_validate(yaml.safe_load(path.read_bytes()))
    except (ValueError, yaml.YAMLError) as error:
        what = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            what = " ".join([".".join(map(str, first["loc"])), first["msg"]])
        raise UserError(
            f"{path} is not the configuration of a run ({' '.join(what.split())}); "
            "repair it, or start anew with another --run.dir"
        ) from None
    before, after = _flat(saved.model_dump(mode="json")), _flat(cfg.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key) and key not in ("run.dir", "run.resume")
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
