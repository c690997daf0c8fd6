"""The training loop of every preference method (``rlsloth.losses.preference.methods``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlsloth.config.preference import PreferenceConfig
from rlsloth.data.example import Example
from rlsloth.data.packing import pack, to_device
from rlsloth.data.preference import reader
from rlsloth.losses.preference.base import (
    LabelledLogps,
    PairLogps,
    PreferenceOutput,
    PreferenceStats,
    metrics,
    normalizer,
    pair_logps,
    score_prompts,
)
from rlsloth.losses.preference.kto import kl_baseline
from rlsloth.losses.preference.methods import PreferenceMethod, method_of
from rlsloth.losses.ratio import rollout_sum
from rlsloth.memory.out_of_memory import again
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, MicroBatch, PackedBatch, Rollout, StepStats
from rlsloth.training.gradients import Shrink, accumulate, update_weights
from rlsloth.training.opening import open_examples
from rlsloth.training.reference import score_by_reference, with_reference
from rlsloth.training.session import Metrics, step_metrics

Score = Callable[[MicroBatch], Tensor]
"""Function from a micro-batch on its device to the policy's log-probs [N] of its scored tokens."""


def train(cfg: PreferenceConfig) -> Path:
    """Run the preference method that the configuration belongs to, and return the run folder.

    Raises:
        UserError: bad input; it is raised before the first step if it can be known by then.
    """
    with ExitStack() as stack:
        session = open_examples(cfg, stack, reader(cfg))
        cfg, policy = session.cfg, session.policy
        if known_method(cfg).precomputes_reference(cfg):
            with_reference(session, reference_sums)

        def measure(heldout: Sequence[Example]) -> Metrics:
            batch = pack_examples(heldout, session.budget.tokens)
            outputs = losses(policy, heldout, batch, cfg, policy.eval_logprobs)
            return metrics([output.stats for output in outputs])

        session.heldout_loss = measure
        session.begin()
        for step in session.steps():
            examples = session.sampler.take(cfg.samples_per_step)
            packed = partial(pack_examples, examples)
            batch = packed(session.budget.tokens)
            with session.updating("examples"):
                shrink = session.budget.shrinking(packed)
                figures, stats = update(policy, examples, batch, cfg, session.run.warn, shrink)
            figures |= step_metrics(stats)
            session.close_step(step, figures, batch, tokens=sum(e.tokens for e in examples))
            session.end_step(step, batch, skipped=stats.skipped)
        return session.finish()


def known_method(cfg: PreferenceConfig) -> PreferenceMethod:
    """Return the method that a configuration belongs to."""
    method = method_of(cfg)
    assert method is not None, f"no preference method has {type(cfg).__name__}"
    return method


def pack_examples(examples: Sequence[Example], tokens_per_microbatch: int) -> PackedBatch:
    """Pack examples into micro-batches; a pair stays whole and has its prompt once."""
    return _pack([example.group() for example in examples], tokens_per_microbatch)


def _pack(groups: Sequence[Group], tokens_per_microbatch: int) -> PackedBatch:
    return pack(
        groups,
        tokens_per_microbatch,
        mask_truncated=False,
        keep_zero_advantage=True,
        whole_groups=True,
    )


def update(
    policy: Policy,
    examples: Sequence[Example],
    batch: PackedBatch,
    cfg: PreferenceConfig,
    warn: Callable[[str], None] = print,
    shrink: Shrink = lambda _: None,
) -> tuple[Metrics, StepStats]:
    """Make one optimizer update; ``batch`` has the step's examples packed by ``pack_examples``.

    ``shrink`` packs them into smaller micro-batches when memory runs out.
    """

    def compute(batch: PackedBatch) -> Metrics:
        stats: list[PreferenceStats] = []
        for output in losses(policy, examples, batch, cfg, lambda m: policy.logprobs(m).logprobs):
            policy.backward(output.total)
            stats.append(output.stats)
        return metrics(stats)

    figures, _ = accumulate(policy, batch, compute, shrink, warn)
    return figures, update_weights(policy, warn)


def losses(
    policy: Policy,
    examples: Sequence[Example],
    batch: PackedBatch,
    cfg: PreferenceConfig,
    score: Score,
) -> Iterator[PreferenceOutput]:
    """Yield each micro-batch's share of the step's loss.

    Free one share's autograd graph before taking the next.
    """
    method = known_method(cfg)
    loss = method.load_loss()
    groups = [example.group() for example in examples]
    norm = normalizer(groups, nll_prompt=method.needs_prompts(cfg))
    kl = _kl(policy, groups, cfg.microbatch, batch.budget) if method.needs_kl(cfg) else None
    micros: Sequence[MicroBatch] = batch.microbatches
    if method.needs_prompts(cfg):
        micros = [score_prompts(micro) for micro in micros]
    scored: Sequence[Tensor | None] = [None] * len(micros)
    known = all(example.reference is not None for example in examples)
    if method.needs_reference(cfg) and not known:
        scored = score_by_reference(policy, micros)
    for micro, reference_N in zip(micros, scored, strict=True):
        micro = to_device(micro, policy.device)
        logps: PairLogps | LabelledLogps
        if method.examples == "pairs":
            logps = pair_logps(score(micro), micro, reference_N)
            if method.needs_reference(cfg) and known:
                logps = _with_known_reference(logps, examples, micro)
        else:
            logps = replace(_labelled_logps(policy, examples, micro, reference_N, score), kl=kl)
        yield loss(logps, cfg.loss, norm)


def _labelled_logps(
    policy: Policy,
    examples: Sequence[Example],
    micro: MicroBatch,
    reference_N: Tensor | None,
    score: Score,
) -> LabelledLogps:
    """Sum the log-probs of a micro-batch's labelled completions."""
    reference_B = None if reference_N is None else rollout_sum(reference_N, micro)
    good = [examples[group].label for group, _ in micro.source]
    desirable_B = torch.tensor(good, device=policy.device)
    return LabelledLogps(rollout_sum(score(micro), micro), desirable_B, reference_B)


@torch.no_grad()
def _kl(policy: Policy, groups: Sequence[Group], tokens_per_microbatch: int, budget: int) -> Tensor:
    """Estimate KTO's KL baseline, a scalar, from completions after other examples' prompts.

    Each completion follows the next example's prompt, which is TRL's pairing, and is cut to the
    context and to ``tokens_per_microbatch`` as configured. ``budget`` is the number of tokens in a
    micro-batch now, which does not change the result.
    """
    limit = min(policy.context, tokens_per_microbatch)
    unrelated = [
        replace(group, rollouts=[_cut(r, limit - len(group.prompt_ids)) for r in other.rollouts])
        for group, other in zip(groups, [groups[-1], *groups[:-1]], strict=True)
    ]
    micros = [to_device(m, policy.device) for m in _pack(unrelated, budget).microbatches]
    policy_parts = [rollout_sum(policy.eval_logprobs(m), m) for m in micros]
    scored = zip(score_by_reference(policy, micros), micros, strict=True)
    reference_parts = [rollout_sum(logprobs_N, m) for logprobs_N, m in scored]
    return kl_baseline(torch.cat(policy_parts), torch.cat(reference_parts))


def _cut(rollout: Rollout, tokens: int) -> Rollout:
    """Cut a rollout to its first tokens, but keep at least one token that carries loss."""
    tokens = max(tokens, 1 + rollout.loss_mask.index(True))
    kept = ("token_ids", "loss_mask", "logprobs", "policy_version")
    return replace(rollout, **{name: getattr(rollout, name)[:tokens] for name in kept})


def _with_known_reference(
    logps: PairLogps, examples: Sequence[Example], micro: MicroBatch
) -> PairLogps:
    """Add the log-probs of a micro-batch's pairs that were computed before the first step."""
    known = [examples[group].reference for group, rollout in micro.source if rollout == 0]
    chosen_P, rejected_P = torch.tensor(known).to(logps.chosen).unbind(1)
    return replace(logps, reference_chosen=chosen_P, reference_rejected=rejected_P)


def reference_sums(
    policy: Policy,
    examples: Sequence[Example],
    tokens_per_microbatch: int,
    warn: Callable[[str], None] = print,
) -> Tensor:
    """Sum the log-probs of chosen and rejected under the starting policy: [len(examples), 2].

    A micro-batch in which memory runs out is scored again.
    """

    def of_one(micro: MicroBatch) -> Tensor:
        micro = to_device(micro, policy.device)
        return rollout_sum(policy.reference_logprobs(micro), micro).cpu()

    sums = torch.zeros(len(examples), 2)
    for micro in pack_examples(examples, tokens_per_microbatch).microbatches:
        found = again(partial(of_one, micro), "scoring by the reference", warn)
        for (group, rollout), value in zip(micro.source, found, strict=True):
            sums[group, rollout] = value
    return sums
