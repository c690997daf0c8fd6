"""The folder of a distillation, and the settings that a resume may change.

config.yaml    the resolved configuration; the same command with --resume continues
raw.jsonl      every sample with its scores, one problem a line
train.jsonl    the dataset (or train.parquet)
README.md      its card
teacher/       log, metrics and report of the sampling
student/       the run of the student, with --train-student
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from rlsloth.config.distill import DistillConfig
from rlsloth.distillation.raw import FILE
from rlsloth.errors import UserError
from rlsloth.run.folder import CONFIG, METRICS
from rlsloth.run.saved_config import changed_settings, refuse_changed, save_config

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
"""Settings and sections that determine the traces, so a resume cannot change them."""


def open_out(cfg: DistillConfig) -> Path:
    """Return the folder to write to; it is made later, with the first file.

    Raises:
        UserError: the folder holds a distillation although --resume is not set, none although it
            is, or one that was made with other settings.
    """
    if cfg.out is None:
        if cfg.resume:
            raise UserError("--resume needs --out, the folder of the distillation to continue")
        return _new_folder(cfg)
    out = cfg.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; pass a folder")
    if not cfg.resume:
        if (out / FILE).exists():
            raise UserError(
                f"{out} already holds traces; continue with --resume, or pass another --out"
            )
        return out
    if not (out / CONFIG).exists():
        raise UserError(f"{out} holds no distillation to resume; leave out --resume to start one")
    changes = changed_settings(
        out / CONFIG, cfg, "repair it, or start another distillation with another --out"
    )
    refuse_changed(out, changes, _FIXED, "start another distillation with another --out")
    return out


def teacher_resumes(out: Path) -> bool:
    """Whether the teacher's log exists, so that it is continued."""
    return (out / TEACHER / METRICS).exists()


def write_config(out: Path, cfg: DistillConfig) -> None:
    """Save the resolved configuration without ``resume``, which has to be set each time."""
    save_config(out / CONFIG, cfg.model_dump(mode="json") | {"out": str(out), "resume": False})


def _new_folder(cfg: DistillConfig) -> Path:
    name = cfg.endpoint.model or cfg.teacher or cfg.model.path
    stem = Path(name.rstrip("/")).name.removesuffix(".gguf") or "teacher"
    base = f"{datetime.now():%Y%m%d-%H%M%S}-{stem}"
    out, attempt = Path("distilled") / base, 1
    while out.exists():
        attempt += 1
        out = out.with_name(f"{base}-{attempt}")
    return out
