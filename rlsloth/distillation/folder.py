"""The folder of a distillation, and whether it may be continued.

config.yaml    the resolved configuration; the same command with --resume goes on
raw.jsonl      every sample with its scores, a line a problem
train.jsonl    the data set (or train.parquet)
README.md      its card
teacher/       log, metrics and report of the sampling
student/       the run that trained on it, if one was asked for
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from rlsloth.config.distill import DistillConfig
from rlsloth.distillation.raw import FILE
from rlsloth.errors import UserError
from rlsloth.run.folder import CONFIG, METRICS, atomic_write

TEACHER = "teacher"
STUDENT = "student"
_FIXED = (
    "seed",
    "rewards",
    "reward.weights",
    "reward.params",
    "teacher",
    "model.path",
    "model.revision",
    "model.adapter",
    "model.precision",
    "endpoint.url",
    "endpoint.model",
    "endpoint.params",
    "env",
    "rollout.max_tokens",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.top_k",
    "rollout.min_p",
    "rollout.stop",
    "traces.samples",
)
"""Settings, or whole sections, that made the traces: they cannot change on resume."""


def open_out(cfg: DistillConfig) -> Path:
    """Where to write; the folder itself is made later.

    Raises:
        UserError: it holds a distillation and resume is off, holds none and it is on, or was made
            with other settings.
    """
    if cfg.out is None:
        if cfg.resume:
            raise UserError("--resume needs --out, the folder of the distillation to continue")
        return _new_folder(cfg)
    out = cfg.out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give another --out")
    if not cfg.resume:
        if (out / FILE).exists():
            raise UserError(
                f"{out} already holds traces; continue with --resume, or give another --out"
            )
        return out
    if not (out / CONFIG).exists():
        raise UserError(f"no distillation in {out} to resume; leave out --resume to start one")
    _refuse_changes(out / CONFIG, cfg)
    return out


def teacher_resumes(out: Path) -> bool:
    """Whether the teacher's log is there to be continued."""
    return (out / TEACHER / METRICS).exists()


def write_config(out: Path, cfg: DistillConfig) -> None:
    """Save the resolved configuration; to continue is asked for each time."""
    new = cfg.model_dump(mode="json") | {"out": str(out), "resume": False}
    text = yaml.safe_dump(new, sort_keys=False, allow_unicode=True, width=100)
    atomic_write(out / CONFIG, text.encode())


def _new_folder(cfg: DistillConfig) -> Path:
    name = cfg.endpoint.model or cfg.teacher or cfg.model.path
    stem = Path(name.rstrip("/")).name.removesuffix(".gguf") or "teacher"
    base = f"{datetime.now():%Y%m%d-%H%M%S}-{stem}"
    out, attempt = Path("distilled") / base, 1
    while out.exists():
        attempt += 1
        out = out.with_name(f"{base}-{attempt}")
    return out


def _refuse_changes(saved: Path, cfg: DistillConfig) -> None:
    try:
        old = DistillConfig.model_validate(yaml.safe_load(saved.read_bytes()))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{saved} is not the configuration of a distillation ({reason}): repair it, or start "
            "anew with another --out"
        ) from None
    before, after = (dict(_flat(c.model_dump(mode="json"))) for c in (old, cfg))
    for key in before | after:
        fixed = any(key == name or key.startswith(f"{name}.") for name in _FIXED)
        if fixed and before.get(key) != after.get(key):
            raise UserError(
                f"{saved.parent} was made with {key} {before.get(key)}, which cannot become "
                f"{after.get(key)} on resume: start another distillation with another --out"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
