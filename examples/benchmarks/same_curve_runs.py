"""The training runs of same_curve.py, and rlsloth's updates in them."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from same_curve_reference import BETAS, CORRECTION_MAX, MAX_NORM, reference

if TYPE_CHECKING:
    from torch import Tensor

    from rlsloth.records import Group

    Weights = dict[str, Tensor]
    Step = list[Group]

REFERENCES = ("reference", "reordered", "halved", "eager", "fp32")
OURS = ("ours", "offloaded")
REPORTED = 50
"""Steps between two lines of progress."""


@dataclass
class Curve:
    """The figures of one training run."""

    losses: list[float] = field(default_factory=list)
    """Loss of each update."""
    norms: list[float] = field(default_factory=list)
    """Norm of each update's gradient before clipping."""
    gaps: list[float] = field(default_factory=list)
    """Mean |log-prob before the step - recorded log-prob| of each GRPO step, nats a token."""
    change: Any = None
    """Final weights minus initial weights, one float64 vector."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Work:
    """A training run to make: its task, its system, and its data."""

    args: argparse.Namespace
    task: str
    """sft or grpo."""
    system: str
    """One of REFERENCES or OURS."""
    steps: list[Step]
    adapter: dict[str, NDArray[np.float32]]
    """Initial values of the trained weights by name; not tensors, which take a file descriptor each
    on their way to another process."""


def train(work: Work) -> Curve:
    """Make a training run; its memory is free again afterwards."""
    import torch

    step, weights = (rlsloth if work.system in OURS else reference)(work)
    if set(weights) != set(work.adapter):
        raise SystemExit(f"{work.system} trains other weights: {set(weights) ^ set(work.adapter)}")
    with torch.no_grad():
        for name, value in work.adapter.items():
            weights[name].copy_(torch.from_numpy(value))
    curve, start = Curve(), time.perf_counter()
    for number, groups in enumerate(work.steps, 1):
        step(curve, number, groups)
        if number % REPORTED == 0 or number == len(work.steps):
            curve.seconds = time.perf_counter() - start
            loss = curve.losses[-1]
            took = f"step {number}, loss {loss:.6f}, {curve.seconds:.1f} s"
            print(f"{work.task} {work.system}: {took}", flush=True)
    final = {name: weights[name].detach().double().cpu().numpy() for name in work.adapter}
    curve.change = np.concatenate([(final[n] - v).ravel() for n, v in work.adapter.items()])
    del step, weights
    free()
    return curve


def free() -> None:
    """Give back the memory of a model that nothing refers to."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


Train = Callable[[Curve, int, "Step"], None]


def rlsloth(work: Work) -> tuple[Train, Weights]:
    """rlsloth's updates of packed streams, in which completions share their prompt."""
    from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig, OptimConfig
    from rlsloth.data.packing import pack
    from rlsloth.losses.advantages import assign_advantages
    from rlsloth.losses.opening import open_loss
    from rlsloth.policy.policy import Policy
    from rlsloth.training import grpo, sft

    args = work.args
    model = ModelConfig(
        path=args.model,
        precision=args.precision,
        trained=[args.trained],
        gradient_checkpointing="offload" if work.system == "offloaded" else True,
    )
    optim = OptimConfig(name="adamw", lr=args.lr, betas=BETAS, max_grad_norm=MAX_NORM)
    lora = LoraConfig(rank=args.rank, alpha=2 * args.rank)
    total = args.steps * args.updates
    policy = Policy.load(model, lora, optim, temperature=1.0, total_updates=total)
    cfg = GrpoConfig.model_validate(
        {
            "updates_per_rollout": args.updates,
            "loss": {"correction": args.correction, "correction_max": CORRECTION_MAX},
        }
    )
    variant = open_loss(cfg.loss)

    def packed(groups: Step, keep: bool) -> Any:
        return pack(groups, args.micro_tokens, mask_truncated=False, keep_zero_advantage=keep)

    def sft_step(curve: Curve, _number: int, groups: Step) -> None:
        metrics, stats = sft.update(policy, packed(groups, True))
        curve.losses.append(metrics["loss"])
        curve.norms.append(stats.grad_norm)

    def grpo_step(curve: Curve, _number: int, groups: Step) -> None:
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            rollout.policy_version = [policy.version] * len(rollout.token_ids)
        assign_advantages(groups, cfg.advantage)
        updates = grpo.update(policy, packed(groups, False), cfg, variant, cfg.loss)
        curve.losses += [update.loss for update in updates]
        curve.norms += [update.step.grad_norm for update in updates]
        curve.gaps.append(updates[0].logp_gap / max(updates[0].stats.tokens, 1))

    step = sft_step if work.task == "sft" else grpo_step
    return step, dict(policy.weights().tensors)
