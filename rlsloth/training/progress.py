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
from rlsloth.run.report.page import is_complete
from rlsloth.run.run import Run
from rlsloth.training.skips import Skips

Contents = dict[str, str]
"""Name of an input, such as ``held-out prompts`` -> digest of its contents."""


CONTINUES = " (--model.adapter continues this run's adapter)"


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
    model = ("path", "revision", "trained", "adapter")
    fixed = ("seed", *(f"model.{key}" for key in model), "lora.", "optim.name", data)
    for key, (old, new) in run.changes.items():
        # What auto was is in the checkpoint's states, which the optimizer checks (optimizer.py).
        settles = key == "optim.name" and "auto" in (old, new)
        if key.startswith(fixed) and key != "data.cache" and not settles:
            raise UserError(
                f"cannot resume {run.dir}: {key} is now {new}, but the run began with {old}; set "
                f"it back, or start another run{'' if key == 'model.trained' else CONTINUES}"
            )


def save(
    run: Run,
    policy: Policy,
    progress: Progress,
    sampler: SamplerState,
    skips: Skips,
    contents: Contents,
    *,
    missing: bool,
    keep: int,
) -> None:
    """Write a checkpoint from which ``resume`` continues bit by bit.

    Args:
        run: the run.
        policy: its weights and optimizer.
        progress: the progress after the last step.
        sampler: position in the data.
        skips: counter of skipped updates.
        contents: digests of the run's inputs.
        missing: whether the evaluation after the step is due and not complete.
        keep: number of checkpoints to keep.

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
        "contents": contents,
        "evaluation_missing": missing,
        "policy": scalars,
    }
    checkpoint.save(run.dir / "checkpoints", progress.next_step - 1, tensors, state, keep)


def resume(
    run: Run,
    cfg: TrainingConfig,
    policy: Policy,
    sampler: EpochSampler[Any],
    skips: Skips,
    contents: Contents,
) -> tuple[Progress, bool]:
    """Restore the newest undamaged checkpoint if this run resumes; else start at step 1.

    Returns:
        The progress, and whether the evaluation after its last step has to be made.

    Raises:
        UserError: the run has finished its steps, its inputs have changed, or its checkpoints are
            damaged.
    """
    if not cfg.run.resume:
        return Progress(1, 0), False
    root = run.dir / "checkpoints"
    found = checkpoint.load_latest(root)
    if found is None:
        run.truncate_after(-1)
        run.accept_config()
        run.say("no checkpoint yet: starting at step 1")
        return Progress(1, 0), False
    ended = is_complete(run.dir)  # else its end was killed, and is made again
    if found.step >= cfg.steps and ended:
        raise UserError(
            f"{run.dir} has finished its {found.step} steps; raise --steps to continue training"
        )
    for warning in found.warnings:
        run.warn(warning)
    sampler.restore(found.state["prompts"])
    _compare(run, contents, found.state.get("contents"))
    policy.restore(found.tensors, found.state["policy"])
    skips.in_a_row = found.state.get("skipped_in_a_row", 0)
    missing = not ended and found.state.get("evaluation_missing", found.step >= cfg.steps)
    checkpoint.repair(root, found.path, cfg.run.keep)
    run.truncate_after(found.step, evaluation=missing)
    run.accept_config()
    run.say(f"resumed from {found.path} after step {found.step}")
    before = found.state["before"]
    progress = Progress(
        found.state["next_step"],
        found.state["num_tokens"],
        _result(before) if before else None,
        found.state.get("loss_before"),
    )
    return progress, missing


def _compare(run: Run, now: Contents, then: Contents | None) -> None:
    """Refuse changed inputs. Raises UserError."""
    if then is None:
        run.say(
            "the checkpoint is of an earlier version, which kept no digests: whether data, base "
            "model, rewards and environment are as before is not checked"
        )
        return
    changed = [name for name, digest in now.items() if then.get(name, digest) != digest]
    if changed:
        raise UserError(
            f"cannot resume {run.dir}: the contents have changed since the run began of "
            f"{', '.join(changed)}; restore them, or start another run"
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
    rows = {name: tuple(row.get(name, ())) for name in ("scores", "rows")}
    return EvalResult(**{**row, **estimates, "passed": passed, **rows})
