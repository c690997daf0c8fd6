"""GRPO: sample groups of rollouts, score them, follow the group-relative policy gradient."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch

from rlsloth.config import GrpoConfig, LossConfig
from rlsloth.data.packing import pack, to_device
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
from rlsloth.training.opening import open_grpo
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
            batch = pack(
                groups,
                cfg.microbatch,
                mask_truncated=cfg.loss.mask_truncated,
                keep_zero_advantage=cfg.loss.beta > 0,
            )
            with session.updating("update"):
                with rollouts.during_update(step):
                    updates = update(policy, batch, cfg, loss, guard.loss)
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
    policy: Policy, batch: PackedBatch, cfg: GrpoConfig, variant: PolicyLoss, loss_cfg: LossConfig
) -> list[UpdateFigures]:
    """Make ``updates_per_rollout`` optimizer updates on one step's rollouts.

    The first update is on-policy: its ratio is exactly 1 and needs no old log-probs. Later updates
    compare with the log-probs that the first one computed, so no update needs a separate pass.

    ``loss_cfg`` is the loss section with the correction that the gap's guard has chosen.
    """
    norm = normalizer(variant, batch, max_tokens=cfg.rollout.max_tokens)
    _check_version(batch, policy.version, cfg)
    if not batch.microbatches:  # every gradient is zero by construction
        return [
            UpdateFigures(0.0, norm, LossStats(), 0.0, 0.0, 0.0, batch.scored_tokens, policy.idle())
            for _ in range(cfg.updates_per_rollout)
        ]
    old: list[torch.Tensor] = []
    reference: list[torch.Tensor] = []
    figures = []
    for round_ in range(cfg.updates_per_rollout):
        total = entropy = gap = gap_max = 0.0
        stats = LossStats()
        for i, micro in enumerate(batch.microbatches):
            micro = to_device(micro, policy.device)
            if round_ == 0 and loss_cfg.beta > 0:
                reference.append(policy.reference_logprobs(micro))
            out = policy.logprobs(micro)
            if round_ == 0:
                old.append(out.logprobs.detach())
            loss = policy_loss(
                variant,
                out.logprobs,
                micro,
                loss_cfg,
                old_logprobs_N=old[i] if round_ else None,
                reference_logprobs_N=reference[i] if reference else None,
            )
            torch.autograd.backward(loss.total / norm)
            difference = (old[i] - micro.rollout_logprobs).abs().nan_to_num(nan=0.0, posinf=0.0)
            sums = [loss.total.detach(), out.entropy.sum(), difference.sum(), difference.max()]
            loss_sum, entropy_sum, gap_sum, gap_most = torch.stack(sums).tolist()
            total, entropy, gap = total + loss_sum, entropy + entropy_sum, gap + gap_sum
            gap_max = max(gap_max, gap_most)
            _add(stats, loss.stats)
        step = policy.step()
        figures.append(
            UpdateFigures(
                loss=total / norm,
                normalizer=norm,
                stats=stats,
                entropy=entropy,
                logp_gap=gap,
                logp_gap_max=gap_max,
                scored_tokens=batch.scored_tokens,
                step=step,
            )
        )
    return figures


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
    for field in fields(LossStats):
        setattr(sums, field.name, getattr(sums, field.name) + getattr(more, field.name))
