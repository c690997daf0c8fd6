"""Where a run stands: written to checkpoints, and found there again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import torch

from rlsloth.config import LoraConfig, OptimConfig
from rlsloth.data.sampler import EpochSampler, SamplerState
from rlsloth.errors import UserError
from rlsloth.evaluation.intervals import Estimate
from rlsloth.evaluation.result import EvalResult
from rlsloth.policy.policy import Policy
from rlsloth.run import checkpoint
from rlsloth.run.folder import SUMMARY, TrainingConfig
from rlsloth.run.run import Run


class LoopConfig(TrainingConfig, Protocol):
    """What loading and resuming read of a loop's configuration."""

    @property
    def lora(self) -> LoraConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def seed(self) -> int: ...


@dataclass(slots=True)
class Progress:
    """Where a run stands."""

    next_step: int
    num_tokens: int
    before: EvalResult | None = None
    """The evaluation by sampling before training."""
    loss_before: float | None = None
    """The loss of held-out examples before training."""


def load_policy(cfg: LoopConfig, run: Run, *, temperature: float, total_updates: int) -> Policy:
    """The policy of a run, said to the user. Raises UserError."""
    run.say(f"loading {cfg.model.path}")
    if cfg.model.adapter is not None:
        run.say(f"continuing {cfg.model.adapter}: its rank, alpha and targets, not --lora.*")
    torch.manual_seed(cfg.seed)  # the adapter's starting weights
    policy = Policy.load(
        cfg.model, cfg.lora, cfg.optim, temperature=temperature, total_updates=total_updates
    )
    if policy.wrapped is not None:
        run.say(policy.wrapped.line())
    return policy


def refuse_changes(run: Run, data: str) -> None:
    """What a checkpoint's tensors and cursors are made of cannot change on resume; ``data``: the
    section that prompts or examples come from. Raises UserError."""
    fixed = ("seed", "model.path", "model.revision", "model.adapter", "lora.", "optim.name", data)
    for key, (old, new) in run.changes.items():
        if key.startswith(fixed):
            raise UserError(
                f"{run.dir} was made with {key} {old}, which cannot become {new} on resume; start "
                "another run (--model.adapter continues from this one's adapter)"
            )


def save(run: Run, policy: Policy, progress: Progress, sampler: SamplerState, keep: int) -> None:
    """Write a checkpoint from which ``resume`` continues to the same next step. Raises
    UserError."""
    tensors, scalars = policy.state()
    state = {
        "next_step": progress.next_step,
        "num_tokens": progress.num_tokens,
        "before": _plain(progress.before) if progress.before else None,
        "loss_before": progress.loss_before,
        "prompts": sampler,
        "policy": scalars,
    }
    checkpoint.save(run.dir / "checkpoints", progress.next_step - 1, tensors, state, keep)


def resume(run: Run, cfg: LoopConfig, policy: Policy, sampler: EpochSampler[Any]) -> Progress:
    """Where to start: at the newest sound checkpoint if this run resumes, else at step 1. Raises
    UserError."""
    if not cfg.run.resume:
        return Progress(1, 0)
    found = checkpoint.load_latest(run.dir / "checkpoints")
    if found is None:
        run.truncate_after(-1)
        run.accept_config(cfg)
        run.say("no checkpoint yet: starting at step 1")
        return Progress(1, 0)
    if found.step >= cfg.steps and (run.dir / SUMMARY).exists():
        raise UserError(f"{run.dir} has finished its {found.step} steps; raise --steps to train on")
    for warning in found.warnings:
        run.warn(warning)
    policy.restore(found.tensors, found.state["policy"])
    sampler.restore(found.state["prompts"])
    run.truncate_after(found.step)
    run.accept_config(cfg)
    run.say(f"resumed from {found.path} after step {found.step}")
    before = found.state["before"]
    return Progress(
        found.state["next_step"],
        found.state["num_tokens"],
        _result(before) if before else None,
        found.state.get("loss_before"),
    )


def run_summary(cfg: LoopConfig, policy: Policy, seconds: float) -> dict[str, Any]:
    """What summary.json says of the run itself."""
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
