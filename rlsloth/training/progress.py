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
    """Progress of a run."""

    next_step: int
    """Number of the next step, from 1."""
    num_tokens: int
    """Tokens that the run has trained on or sampled."""
    before: EvalResult | None = None
    """The evaluation by sampling before training."""
    loss_before: float | None = None
    """The loss of held-out examples before training."""


def refuse_changes(run: Run, data: str) -> None:
    """Raise UserError for a resumed run whose seed, model, adapter, optimizer or data has changed.

    The checkpoint's tensors and its position in the data belong to them.

    Args:
        run: the run, which knows its changed settings.
        data: prefix of the data's settings, ``env.`` or ``data.``.
    """
    fixed = ("seed", "model.path", "model.revision", "model.adapter", "lora.", "optim.name", data)
    for key, (old, new) in run.changes.items():
        if key.startswith(fixed):
            raise UserError(
                f"cannot resume {run.dir}: {key} is now {new}, but the run began with {old}; set "
                "it back, or start another run (--model.adapter continues this run's adapter)"
            )


def save(
    run: Run,
    policy: Policy,
    progress: Progress,
    sampler: SamplerState,
    skips: Skips,
    keep: int,
) -> None:
    """Write a checkpoint from which ``resume`` continues bit by bit.

    Raises:
        UserError: the checkpoint cannot be written.
    """
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
    """Restore the newest undamaged checkpoint if this run resumes; else start at step 1.

    Raises:
        UserError: the run has finished its steps, or its checkpoints are damaged.
    """
    if not cfg.run.resume:
        return Progress(1, 0)
    found = checkpoint.load_latest(run.dir / "checkpoints")
    if found is None:
        run.truncate_after(-1)
        run.accept_config()
        run.say("no checkpoint yet: starting at step 1")
        return Progress(1, 0)
    if found.step >= cfg.steps and (run.dir / SUMMARY).exists():
        raise UserError(
            f"{run.dir} has finished its {found.step} steps; raise --steps to continue training"
        )
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
    """Return the part of summary.json about the run itself."""
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
