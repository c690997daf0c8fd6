"""Supervised fine-tuning: raise the likelihood of examples' completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlsloth.config.sft import SftConfig
from rlsloth.data.example import Example
from rlsloth.data.packing import pack, to_device
from rlsloth.data.sft import sft_examples
from rlsloth.policy.policy import Policy
from rlsloth.records import PackedBatch, StepStats
from rlsloth.training.gradients import Shrink, accumulate, update_weights
from rlsloth.training.opening import open_examples
from rlsloth.training.session import Metrics, step_metrics


def train(cfg: SftConfig) -> Path:
    """Run SFT and return the run folder.

    Raises:
        UserError: bad input; it is raised before the first step if it can be known by then.
    """
    with ExitStack() as stack:
        session = open_examples(cfg, stack, sft_examples)
        cfg, policy = session.cfg, session.policy
        session.heldout_loss = lambda heldout: held_out_loss(
            policy, pack_examples(heldout, session.budget.tokens)
        )
        session.begin()
        for step in session.steps():
            examples = session.sampler.take(cfg.samples_per_step)
            packed = partial(pack_examples, examples)
            batch = packed(session.budget.tokens)
            with session.updating("examples"):
                shrink = session.budget.shrinking(packed)
                metrics, stats = update(policy, batch, session.run.warn, shrink)
            metrics |= step_metrics(stats)
            session.close_step(step, metrics, batch, tokens=sum(e.tokens for e in examples))
            session.end_step(step, batch, skipped=stats.skipped)
        return session.finish()


def pack_examples(examples: Sequence[Example], tokens_per_microbatch: int) -> PackedBatch:
    """Pack examples into micro-batches without padding; no example sees another."""
    groups = [example.group() for example in examples]
    return pack(groups, tokens_per_microbatch, mask_truncated=False, keep_zero_advantage=True)


def update(
    policy: Policy,
    batch: PackedBatch,
    warn: Callable[[str], None] = print,
    shrink: Shrink = lambda _: None,
) -> tuple[Metrics, StepStats]:
    """Make one optimizer update on the mean of -log p over the step's trained tokens.

    The update does not depend on how the step is divided into micro-batches, which ``shrink`` makes
    smaller when memory runs out.
    """

    def compute(batch: PackedBatch) -> list[float]:
        sums: list[Tensor] = []
        for micro in batch.microbatches:
            out = policy.logprobs(to_device(micro, policy.device))
            nll = -out.logprobs.sum()
            policy.backward(nll / batch.scored_tokens)
            sums.append(torch.stack([nll.detach(), out.entropy.sum()]))
        means: list[float] = (torch.stack(sums).sum(0) / batch.scored_tokens).tolist()
        return means

    (loss, entropy), _ = accumulate(policy, batch, compute, shrink, warn)
    return {"loss": loss, "entropy": entropy}, update_weights(policy, warn)


def held_out_loss(policy: Policy, batch: PackedBatch) -> Metrics:
    """Return the mean of -log p over the trained tokens, nats a token."""
    nll = -sum(
        float(policy.eval_logprobs(to_device(micro, policy.device)).sum())
        for micro in batch.microbatches
    )
    return {"loss": nll / batch.scored_tokens}
