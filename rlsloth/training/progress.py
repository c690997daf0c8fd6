"""The progress of a run: written to checkpoints and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch

from rlsloth.config import TrainingConfig
from rlsloth.data.sampler import EpochSampler, SamplerState
from rlsloth.errors import UserError
from rlsloth.evaluation.intervals import Estimate
from rlsloth.evaluation.result import EvalResult
from rlsloth.policy.policy import Policy
from rlsloth.run import checkpoint
from rlsloth.run.folder import SUMMARY
from rlsloth.run.run import Run
from rlsloth.training.skips import Skips


@dataclass(slots=True)
class Progress:
    """The progress of a run."""

    next_step: int
    num_tokens: int
    before: EvalResult | None = None
    """The evaluation by sampling before training."""
    loss_before: float | None = None
    """The loss of held-out examples before training."""


def refuse_changes(run: Run, data: str) -> None:
    """Refuse to resume with another seed, model, adapter, optimizer or data: a checkpoint's tensors
    and positions belong to them. Raises UserError.

    Args:
        data: prefix of the data's settings, ``env.`` or ``data.``.
    """
    fixed = ("seed", "model.path", "model.revision", "model.adapter", "lora.", "optim.name", data)
    for key, (old, new) in run.changes.items():
        if key.startswith(fixed):
            raise UserError(
                f"{run.dir} was made with {key} {old}, which cannot become {new} on resume; start "
                "another run (--model.adapter continues from this one's adapter)"
            )


def save(
    run: Run,
    policy: Policy,
    progress: Progress,
    sampler: SamplerState,
    skips: Skips,
    keep: int,
) -> None:
    """Write a checkpoint from which ``resume`` continues to the same next step. Raises
    UserError."""
    tensors, scalars = policy.state()
    state = {
        "next_step": progress.next_step,
        "num_tokens": progress.num_tokens,
        "before": _plain(progress.before) if progress.before else None,
        "loss_before": progress.loss_before,
        "prompts": sampler,
        "skipped_in_a_row": skips.in_a_row,
        "policy": scalars,
    }
    checkpoint.save(run.dir / "checkpoints", progress.next_step - 1, tensors, state, keep)


def resume(
    run: Run, cfg: TrainingConfig, policy: Policy, sampler: EpochSampler[Any], skips: Skips
) -> Progress:
    """Restore the newest sound checkpoint if this run resumes; else start at step 1. Raises
    UserError."""
    if not cfg.run.resume:
        return Progress(1, 0)
    found = checkpoint.load_latest(run.dir / "checkpoints")
    if found is None:
        run.truncate_after(-1)
        run.accept_config()
        run.say("no checkpoint yet: starting at step 1")
        return Progress(1, 0)
    if found.step >= cfg.steps and (run.dir / SUMMARY).exists():
        raise UserError(f"{run.dir} has finished its {found.step} steps; raise --steps to train on")
    for warning in found.warnings:
        run.warn(warning)
    policy.restore(found.tensors, found.state["policy"])
    sampler.restore(found.state["prompts"])
    skips.in_a_row = found.state.get("skipped_in_a_row", 0)
    run.truncate_after(found.step)
    run.accept_config()
    run.say(f"resumed from {found.path} after step {found.step}")
    before = found.state["before"]
    return Progress(
        found.state["next_step"],
        found.state["num_tokens"],
        _result(before) if before else None,
        found.state.get("loss_before"),
    )


def run_summary(cfg: TrainingConfig, policy: Policy, seconds: float) -> dict[str, Any]:
    """Return the lines of summary.json about the run itself."""
    device = policy.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"steps": cfg.steps, "seconds": round(seconds, 1), "device": name}


def _plain(result: EvalResult) -> dict[str, Any]:
    row = {name: getattr(result, name) for name in EvalResult.__slots__}
    for name in ("avg", "majority"):
        row[name] = astuple(row[name])
    return row | {"passed": [(j, astuple(e)) for j, e in result.passed]}


def _result(row: Mapping[str, Any]) -> EvalResult:
    estimates = {name: Estimate(*row[name]) for name in ("avg", "majority")}
    passed = tuple((j, Estimate(*e)) for j, e in row["passed"])
    return EvalResult(**{**row, **estimates, "passed": passed, "scores": tuple(row["scores"])})
