"""GRPO: sample groups, score them, follow the group-relative policy gradient."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch

from rlsloth.config import GrpoConfig
from rlsloth.data.packing import pack, to_device
from rlsloth.evaluation.evaluator import result_summary
from rlsloth.losses.advantages import assign_advantages, overlong_penalty
from rlsloth.losses.base import PolicyLoss
from rlsloth.losses.opening import open_loss
from rlsloth.losses.policy_loss import normalizer, policy_loss
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.lora import save_adapter
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, LossStats, PackedBatch
from rlsloth.run.diagnosis import Watch
from rlsloth.run.gap import GapGuard
from rlsloth.run.metrics import (
    LOGP_GAP,
    UpdateFigures,
    count_tokens,
    rollout_metrics,
    update_metrics,
)
from rlsloth.seeding import derive_seed
from rlsloth.training.assembly import Assembly
from rlsloth.training.progress import run_summary
from rlsloth.training.rollouts import Rollouts
from rlsloth.training.skips import Skips


def train(cfg: GrpoConfig) -> Path:
    """Run GRPO as configured; returns the run folder.

    Raises:
        UserError: bad input, said before the first step where it can be known by then.
    """
    started = time.monotonic()
    loss = open_loss(cfg.loss)
    with ExitStack() as stack:
        parts = Assembly.open(cfg, stack)
        parts.check_training()
        cfg, run, policy, scorer = parts.cfg, parts.run, parts.policy, parts.scorer
        at = parts.resume()
        if at.next_step == 1 and cfg.eval.at_start:
            at.before = parts.evaluate(at.next_step - 1)
        watch = Watch(scorer.names, cfg.loss.mask_truncated, run.history(), cfg.rollout.cut_tail)
        guard = GapGuard(cfg, run)
        skips = Skips(cfg.optim.max_skipped)
        rollouts = Rollouts(parts, stack)
        for step in run.steps(at.next_step, cfg.steps):
            # For dropout; sampling has a generator of its own.
            torch.manual_seed(derive_seed(cfg.seed, "dropout", step))
            groups = rollouts.take(step)
            with run.timed("reward"):  # what is left of it once all is sampled
                report = scorer.score(groups, step=step)
                shape_overlong(groups, cfg)
            assign_advantages(groups, cfg.advantage)
            batch = pack(
                groups,
                cfg.microbatch,
                mask_truncated=cfg.loss.mask_truncated,
                keep_zero_advantage=cfg.loss.beta > 0,
            )
            with run.timed("update"):
                with rollouts.beside_update(step), advise("update", policy.model):
                    updates = update(policy, batch, guard.cfg, loss)
                parts.engine.set_weights(policy.weights())
            at.num_tokens += count_tokens(groups)
            at.next_step = step + 1
            metrics = {
                **rollout_metrics(groups, scorer.names, num_tokens=at.num_tokens),
                **update_metrics(updates, clipping=loss.clipping, beta=cfg.loss.beta),
                "trained_tokens": float(batch.trained_tokens),
                **report.metrics,
            }
            run.log(step, metrics)
            run.log_samples(step, groups, scorer.names)
            for sentence in watch.step(groups, metrics):
                run.warn(sentence)
            for sentence in watch.explain(metrics):
                run.say(sentence)
            guard.check(step, metrics[LOGP_GAP])
            skips.check(any(u.step.skipped for u in updates), batch, run, step)
            if cfg.eval.every and step % cfg.eval.every == 0 and step < cfg.steps:
                parts.evaluate(step)
            if step == cfg.steps or (cfg.run.save_every and step % cfg.run.save_every == 0):
                with run.timed("checkpoint"):
                    parts.save(at, rollouts.prompts())
        save_adapter(policy.model, run.dir / "adapter")
        after = parts.evaluate(cfg.steps) if cfg.eval.at_end else None
        seconds = time.monotonic() - started
        run.finish(result_summary(at.before, after) | run_summary(cfg, policy, seconds))
        return run.dir


def update(
    policy: Policy, batch: PackedBatch, cfg: GrpoConfig, variant: PolicyLoss
) -> list[UpdateFigures]:
    """``updates_per_rollout`` optimizer updates on one step's rollouts.

    The first is exactly on-policy: its ratio is 1 by construction and needs no old log-probs. Later
    ones compare with the log-probs the first one computed, so no separate pass for them exists
    either.
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
            if round_ == 0 and cfg.loss.beta > 0:
                reference.append(policy.reference_logprobs(micro))
            out = policy.logprobs(micro)
            if round_ == 0:
                old.append(out.logprobs.detach())
            loss = policy_loss(
                variant,
                out.logprobs,
                micro,
                cfg.loss,
                old_logprobs_N=old[i] if round_ else None,
                reference_logprobs_N=reference[i] if reference else None,
            )
            torch.autograd.backward(loss.total / norm)
            difference = (old[i] - micro.rollout_logprobs).abs().nan_to_num(nan=0.0, posinf=0.0)
            sums = torch.stack(
                [loss.total.detach(), out.entropy.sum(), difference.sum(), difference.max()]
            )
            a, b, c, d = sums.tolist()
            total, entropy, gap, gap_max = total + a, entropy + b, gap + c, max(gap_max, d)
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
    """The ratio counts as exactly 1, which holds only for tokens of the very policy that is
    updated; overlapped rollouts are one step older, and corrected for it."""
    late = cfg.updates_per_rollout if cfg.rollout.overlap else 0
    known = range(version - late, version + 1)
    for micro in batch.microbatches:
        if stale := sorted(v for v in set(micro.policy_version.tolist()) if v not in known):
            raise RuntimeError(f"rollouts of policy version {stale} met an update of {version}")


def _add(sums: LossStats, more: LossStats) -> None:
    for field in fields(LossStats):
        setattr(sums, field.name, getattr(sums, field.name) + getattr(more, field.name))


def shape_overlong(groups: list[Group], cfg: GrpoConfig) -> None:
    """Add DAPO's soft overlong punishment to the rewards."""
    if not cfg.loss.overlong_buffer:
        return
    for rollout in (r for group in groups for r in group.rollouts):
        if rollout.reward is not None:
            rollout.reward += overlong_penalty(
                rollout.length, cfg.rollout.max_tokens, cfg.loss.overlong_buffer
            )
