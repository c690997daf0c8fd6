"""Supervised fine-tuning: raise the likelihood of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from rlsloth.config.sft import SftConfig
from rlsloth.data.example import Example
from rlsloth.data.packing import pack, to_device
from rlsloth.data.sft import sft_examples
from rlsloth.policy.policy import Policy
from rlsloth.records import PackedBatch, StepStats
from rlsloth.training.supervised import Metrics, Supervised


def train(cfg: SftConfig) -> Path:
    """Run SFT as configured; returns the run folder.

    Raises:
        UserError: bad input, said before the first step where it can be known by then.
    """
    with ExitStack() as stack:
        parts = Supervised.open(cfg, stack, sft_examples)
        cfg, policy = parts.cfg, parts.policy

        def measure(heldout: Sequence[Example]) -> Metrics:
            return held_out_loss(policy, pack_examples(heldout, cfg.microbatch))

        at = parts.begin(measure)
        for step, examples in parts.steps(at):
            batch = pack_examples(examples, cfg.microbatch)
            with parts.updating():
                figures = update(policy, batch)
            parts.close_step(at, step, examples, batch, figures, measure)
        return parts.finish(at, measure)


def pack_examples(examples: Sequence[Example], tokens_per_microbatch: int) -> PackedBatch:
    """Micro-batches without padding, in which no example sees another."""
    groups = [example.group() for example in examples]
    return pack(groups, tokens_per_microbatch, mask_truncated=False, keep_zero_advantage=True)


def update(policy: Policy, batch: PackedBatch) -> tuple[Metrics, StepStats]:
    """One optimizer update on the mean of -log p over the step's learnt tokens, however the step is
    cut into micro-batches."""
    sums = []
    for micro in batch.microbatches:
        out = policy.logprobs(to_device(micro, policy.device))
        nll = -out.logprobs.sum()
        torch.autograd.backward(nll / batch.scored_tokens)
        sums.append(torch.stack([nll.detach(), out.entropy.sum()]))
    step = policy.step()
    loss, entropy = (torch.stack(sums).sum(0) / batch.scored_tokens).tolist()
    return {"loss": loss, "entropy": entropy}, step


def held_out_loss(policy: Policy, batch: PackedBatch) -> Metrics:
    """Mean of -log p over the learnt tokens, in nats."""
    nll = -sum(
        float(policy.eval_logprobs(to_device(micro, policy.device)).sum())
        for micro in batch.microbatches
    )
    return {"loss": nll / batch.scored_tokens}
