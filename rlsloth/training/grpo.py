"""GRPO: sample groups of rollouts, score them, follow the group-relative policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

from rlsloth.config import GrpoConfig, LossConfig
from rlsloth.data.packing import pack, regroup, to_device
from rlsloth.losses.advantages import assign_advantages
from rlsloth.losses.base import PolicyLoss
from rlsloth.losses.opening import open_loss
from rlsloth.losses.policy_loss import normalizer, policy_loss
from rlsloth.policy.policy import Policy
from rlsloth.records import LossStats, PackedBatch
from rlsloth.run.gap import GapGuard
from rlsloth.run.metrics import (
    LOGP_GAP,
    UpdateFigures,
    count_tokens,
    rollout_metrics,
    update_metrics,
)
from rlsloth.run.watch import Watch
from rlsloth.scoring.patience import FailedRounds
from rlsloth.scoring.shaping import penalize_overlong
from rlsloth.training.gradients import Shrink, accumulate, update_weights
from rlsloth.training.opening import open_grpo
from rlsloth.training.reference import score_by_reference
from rlsloth.training.rollouts import Rollouts


def train(cfg: GrpoConfig) -> Path:
    """Run GRPO and return the run folder.

    Raises:
        UserError: bad input; it is raised before the first step if it can be known by then.
    """
    loss = open_loss(cfg.loss)
    with ExitStack() as stack:
        session = open_grpo(cfg, stack)
        assert session.evaluator is not None  # its collector also samples the rollouts
        cfg, run, policy = session.cfg, session.run, session.policy
        collector = session.evaluator.collector
        scorer = collector.scorer
        session.begin()
        watch = Watch(
            scorer.names,
            cfg.loss.mask_truncated,
            run.history(),
            cfg.rollout.cut_tail,
            cfg.rollout.temperature,
        )
        guard = GapGuard(cfg.loss, cfg.rollout, run)
        rollouts = Rollouts(cfg, collector, session.sampler, policy, run, stack)
        session.cursor = rollouts.cursor
        failed = FailedRounds()
        for step in session.steps():
            groups = rollouts.take(step)
            with run.timed("reward"):  # the time that sampling did not hide
                report = scorer.score(groups, step=step)
            failed.check(report)
            penalize_overlong(
                groups, max_tokens=cfg.rollout.max_tokens, buffer=cfg.loss.overlong_buffer
            )
            assign_advantages(groups, cfg.advantage)
            packed = partial(
                pack,
                groups,
                mask_truncated=cfg.loss.mask_truncated,
                keep_zero_advantage=cfg.loss.beta > 0,
            )
            batch = packed(session.budget.tokens)
            with session.updating("update"):
                shrink = session.budget.shrinking(packed)
                with rollouts.during_update(step):
                    updates = update(policy, batch, cfg, loss, guard.loss, run.warn, shrink)
                collector.engine.set_weights(policy.weights())
            tokens = count_tokens(groups)
            metrics = rollout_metrics(groups, scorer.names, num_tokens=tokens)
            metrics |= update_metrics(updates, clipping=loss.clipping, beta=cfg.loss.beta)
            # What a reward logs never takes the place of the trainer's own figure.
            metrics |= {k: v for k, v in report.metrics.items() if k not in metrics}
            session.close_step(step, metrics, batch, tokens=tokens)
            run.log_samples(step, groups, scorer.names)
            watch.report(groups, metrics, run.warn, run.say)
            guard.check(step, metrics[LOGP_GAP])
            session.end_step(step, batch, skipped=any(u.step.skipped for u in updates))
        return session.finish()


def update(
    policy: Policy,
    batch: PackedBatch,
    cfg: GrpoConfig,
    variant: PolicyLoss,
    loss_cfg: LossConfig,
    warn: Callable[[str], None] = print,
    shrink: Shrink = lambda _: None,
) -> list[UpdateFigures]:
    """Make ``updates_per_rollout`` optimizer updates on one step's rollouts.

    The first update is on-policy: its ratio is exactly 1 and needs no old log-probs. Later updates
    compare with the log-probs that the first one computed, so no update needs a separate pass.

    ``loss_cfg`` is the loss section with the correction that the gap's guard has chosen. ``shrink``
    packs the rollouts into smaller micro-batches when memory runs out.
    """
    norm = normalizer(variant, batch, max_tokens=cfg.rollout.max_tokens)
    _check_version(batch, policy.version, cfg)
    if not batch.microbatches:  # every gradient is zero by construction
        return [
            UpdateFigures(0.0, norm, LossStats(), 0.0, 0.0, 0.0, batch.scored_tokens, policy.idle())
            for _ in range(cfg.updates_per_rollout)
        ]
    first: Round | None = None
    figures = []
    for _ in range(cfg.updates_per_rollout):
        compute = partial(_gradients, policy, variant, loss_cfg, norm, first)
        done, batch = accumulate(policy, batch, compute, shrink, warn)
        first = first or done
        step = update_weights(policy, warn)
        figures.append(
            UpdateFigures(
                loss=done.loss / norm,
                normalizer=norm,
                stats=done.stats,
                entropy=done.entropy,
                logp_gap=done.gap,
                logp_gap_max=done.gap_max,
                scored_tokens=batch.scored_tokens,
                step=step,
            )
        )
    return figures


@dataclass(slots=True)
class Round:
    """The sums of one update over its micro-batches."""

    batch: PackedBatch
    """The micro-batches."""
    old: list[torch.Tensor] = field(default_factory=list)
    """Log-probs [N] of each micro-batch before the first update; empty in later ones."""
    reference: list[torch.Tensor] = field(default_factory=list)
    """Log-probs [N] of each micro-batch under the reference; empty without a KL term."""
    stats: LossStats = field(default_factory=LossStats)
    loss: float = 0.0
    entropy: float = 0.0
    gap: float = 0.0
    gap_max: float = 0.0

    def on(self, batch: PackedBatch) -> Round:
        """Return the update as if it had been computed on other micro-batches of its rollouts."""
        if batch is self.batch:
            return self
        old = regroup(self.old, self.batch, batch)
        reference = regroup(self.reference, self.batch, batch) if self.reference else []
        return replace(self, batch=batch, old=old, reference=reference)


def _gradients(
    policy: Policy,
    variant: PolicyLoss,
    loss_cfg: LossConfig,
    norm: float,
    first: Round | None,
    batch: PackedBatch,
) -> Round:
    """Add the gradients of all micro-batches; ``first`` is the first update's, None in that one."""
    done = Round(batch)
    first = first and first.on(batch)
    if first is None and loss_cfg.beta > 0:
        done.reference = score_by_reference(policy, batch.microbatches)
    for i, micro in enumerate(batch.microbatches):
        micro = to_device(micro, policy.device)
        out = policy.logprobs(micro)
        if first is None:
            done.old.append(out.logprobs.detach())
        known = first or done
        loss = policy_loss(
            variant,
            out.logprobs,
            micro,
            loss_cfg,
            old_logprobs_N=first.old[i] if first else None,
            reference_logprobs_N=known.reference[i] if known.reference else None,
        )
        policy.backward(loss.total / norm)
        difference = (known.old[i] - micro.rollout_logprobs).abs().nan_to_num(nan=0.0, posinf=0.0)
        sums = [loss.total.detach(), out.entropy.sum(), difference.sum(), difference.max()]
        loss_sum, entropy_sum, gap_sum, gap_most = torch.stack(sums).tolist()
        done.loss, done.entropy = done.loss + loss_sum, done.entropy + entropy_sum
        done.gap, done.gap_max = done.gap + gap_sum, max(done.gap_max, gap_most)
        _add(done.stats, loss.stats)
    return done


def _check_version(batch: PackedBatch, version: int, cfg: GrpoConfig) -> None:
    """Raise RuntimeError for rollouts of another policy version than the one that is updated.

    The first update takes the ratio as exactly 1, which holds only for that version. Overlapped
    rollouts are one step older, for which ``loss.correction`` corrects.
    """
    late = cfg.updates_per_rollout if cfg.rollout.overlap else 0
    known = range(version - late, version + 1)
    for micro in batch.microbatches:
        if stale := sorted(v for v in set(micro.policy_version.tolist()) if v not in known):
            raise RuntimeError(
                f"a bug in rlsloth: the rollouts are of policy version {stale}, but version "
                f"{version} would be trained on them"
            )


def _add(sums: LossStats, more: LossStats) -> None:
    for one in fields(LossStats):
        setattr(sums, one.name, getattr(sums, one.name) + getattr(more, one.name))
