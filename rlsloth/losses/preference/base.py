"""Shared parts of preference losses: summed log-probs, the step's normaliser, statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlsloth.losses.ratio import rollout_sum
from rlsloth.records import Group, MicroBatch


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probs of a micro-batch's P pairs, summed over the scored tokens of each completion."""

    chosen: Tensor
    rejected: Tensor
    """[P] of the policy, differentiable."""
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    """[P] scored tokens, as floats."""
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    """[P] of the starting policy; None where the loss has no reference."""
    prompt: Tensor | None = None
    prompt_tokens: Tensor | None = None
    """[P] of the policy over the prompt without its first token; None if prompts are not scored."""

    @property
    def chosen_mean(self) -> Tensor:
        """[P] mean log-prob of the chosen completion's tokens."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """[P] mean log-prob of the rejected completion's tokens."""
        return self.rejected / self.rejected_tokens


@dataclass(frozen=True, slots=True)
class LabelledLogps:
    """Log-probs of a micro-batch's B labelled completions, summed over their scored tokens."""

    policy: Tensor
    """[B] of the policy, differentiable."""
    desirable: Tensor
    """[B] bool: labelled good."""
    reference: Tensor | None = None
    """[B] of the starting policy; None where the loss has no reference."""
    kl: Tensor | None = None
    """[] estimate of the KL to the starting policy, the same for the whole step; None where the
    loss does not use it."""


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Counts that a step's sums are divided by; the same for all its micro-batches.

    TRL uses the counts of each micro-batch, so its negative log-likelihood depends on how a step is
    divided. Here they are those of the step; results equal TRL's with one micro-batch a step.
    """

    examples: int
    """Pairs of the step, or unpaired completions."""
    nll_tokens: int = 0
    """Tokens under the negative log-likelihood."""


@dataclass(frozen=True, slots=True)
class PreferenceStats:
    """Detached figures of a micro-batch, which ``metrics`` adds up."""

    loss: float
    """The micro-batch's share of the step's loss."""
    sums: dict[str, tuple[float, float]]
    """TRL's name of a metric to its sum and the count that the step's sum is divided by."""


@dataclass(frozen=True, slots=True)
class PreferenceOutput:
    """A micro-batch's share of its step's loss."""

    total: Tensor
    """[] differentiable, already normalised: the step's loss is the sum of these."""
    stats: PreferenceStats


def normalizer(groups: Sequence[Group], *, nll_prompt: bool = False) -> Normalizer:
    """Counts of a step of pairs, each a group of the chosen and the rejected rollout.

    Args:
        nll_prompt: whether the negative log-likelihood covers the prompts, without their first
            token.
    """
    tokens = sum(group.rollouts[0].length for group in groups)
    if nll_prompt:
        tokens += sum(len(group.prompt_ids) - 1 for group in groups)
    return Normalizer(len(groups), tokens)


def score_prompts(micro: MicroBatch) -> MicroBatch:
    """A copy of the micro-batch whose prompts are scored too, all their tokens but the first.

    Prompts follow the rollouts as further entries of ``rollout_of``, one a tree, in the stream's
    order; ``source`` still names only the rollouts. Cheapest before the micro-batch is moved to a
    GPU.
    """
    first_S = torch.ones_like(micro.tree_of, dtype=torch.bool)
    first_S[1:] = micro.tree_of[1:] != micro.tree_of[:-1]
    starts = micro.cu_seqlens_q[:-1][first_S].tolist()
    ends = micro.cu_seqlens_q[1:][first_S].tolist()
    device = micro.token_ids.device
    spans = [torch.arange(a, b - 1, device=device) for a, b in zip(starts, ends, strict=True)]
    index_M = torch.cat(spans)
    prompt_M = torch.tensor([len(span) for span in spans], device=device)
    prompt_M = torch.arange(len(spans), device=device).repeat_interleave(prompt_M)
    zeros_M = torch.zeros(len(index_M), device=device)
    return replace(
        micro,
        score_index=torch.cat([micro.score_index, index_M]),
        target_ids=torch.cat([micro.target_ids, micro.token_ids[index_M + 1]]),
        rollout_of=torch.cat([micro.rollout_of, micro.rollout_count + prompt_M]),
        advantages=torch.cat([micro.advantages, zeros_M]),
        rollout_logprobs=torch.cat([micro.rollout_logprobs, zeros_M]),
        policy_version=torch.cat([micro.policy_version, torch.full_like(index_M, -1)]),
        rollout_count=micro.rollout_count + len(spans),
    )


def pair_logps(
    logprobs_N: Tensor, micro: MicroBatch, reference_logprobs_N: Tensor | None = None
) -> PairLogps:
    """Sums over the completions of a micro-batch of whole pairs, chosen before rejected.

    For a ``micro`` from ``score_prompts``, the prompts' sums are filled in too.
    """
    rollouts = len(micro.source)
    pairs = rollouts // 2
    assert micro.source == tuple((g, r) for g, _ in micro.source[::2] for r in (0, 1)), (
        "a micro-batch of preference pairs holds both rollouts of each group"
    )
    sums = rollout_sum(logprobs_N, micro)
    counts = rollout_sum(torch.ones_like(logprobs_N), micro)
    chosen_P, rejected_P = sums[:rollouts].view(pairs, 2).unbind(1)
    chosen_tokens_P, rejected_tokens_P = counts[:rollouts].view(pairs, 2).unbind(1)
    logps = PairLogps(chosen_P, rejected_P, chosen_tokens_P, rejected_tokens_P)
    if reference_logprobs_N is not None:
        reference = rollout_sum(reference_logprobs_N, micro)[:rollouts].view(pairs, 2)
        logps = replace(logps, reference_chosen=reference[:, 0], reference_rejected=reference[:, 1])
    if micro.rollout_count > rollouts:
        logps = replace(logps, prompt=sums[rollouts:], prompt_tokens=counts[rollouts:])
    return logps


def logistic_loss(logits_P: Tensor, label_smoothing: float) -> Tensor:
    """[P] cross-entropy of the preference when a share of the labels is flipped (conservative DPO,
    Mitchell 2023); -logsigmoid without smoothing."""
    loss_P = -logsigmoid(logits_P)
    if label_smoothing == 0:
        return loss_P
    return (1 - label_smoothing) * loss_P - label_smoothing * logsigmoid(-logits_P)


def pair_sums(
    chosen_rewards_P: Tensor, rejected_rewards_P: Tensor, chosen_P: Tensor, rejected_P: Tensor
) -> dict[str, tuple[Tensor, Tensor | int]]:
    """Sums and counts of the metrics that all losses on pairs have, from rewards and log-probs."""
    pairs = len(chosen_P)
    sums = {
        "rewards/chosen": chosen_rewards_P.sum(),
        "rewards/rejected": rejected_rewards_P.sum(),
        "rewards/accuracies": (chosen_rewards_P > rejected_rewards_P).sum(),
        "logps/chosen": chosen_P.sum(),
        "logps/rejected": rejected_P.sum(),
    }
    return {name: (value, pairs) for name, value in sums.items()}


def output(total: Tensor, sums: Mapping[str, tuple[Tensor, Tensor | int]]) -> PreferenceOutput:
    """The output with its statistics read from the device in one transfer."""
    flat = [total, *(x for pair in sums.values() for x in pair)]
    device = total.device
    values = [torch.as_tensor(x, device=device).detach().to(total.dtype) for x in flat]
    loss, *read = torch.stack(values).tolist()
    means = dict(zip(sums, zip(read[::2], read[1::2], strict=True), strict=True))
    return PreferenceOutput(total, PreferenceStats(loss, means))


def metrics(parts: Iterable[PreferenceStats]) -> dict[str, float]:
    """The step's metrics under TRL's names, from the figures of its micro-batches.

    A mean over nothing (no good completion in a step of KTO) is left out.
    """
    loss = 0.0
    sums: dict[str, tuple[float, float]] = {}
    for part in parts:
        loss += part.loss
        for name, (value, count) in part.sums.items():
            total, counted = sums.get(name, (0.0, 0.0))
            sums[name] = (total + value, counted + count)
    means = {name: value / count for name, (value, count) in sums.items() if count}
    chosen, rejected = means.get("rewards/chosen"), means.get("rewards/rejected")
    if chosen is not None and rejected is not None:
        means["rewards/margins"] = chosen - rejected
    return {"loss": loss, **means}
