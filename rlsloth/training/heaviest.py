"""A run's heaviest micro-batch, tried before step 1: what does not fit is changed by then."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rlsloth.data.packing import pack, to_device
from rlsloth.memory.activations import Stream
from rlsloth.memory.out_of_memory import advice
from rlsloth.policy.activations.placement import describe
from rlsloth.policy.optimizer import park, reserve
from rlsloth.policy.policy import Policy
from rlsloth.policy.random_state import random_state, set_random_state
from rlsloth.records import Group, PackedBatch, Prompt, Rollout
from rlsloth.training.gradients import Budget, accumulate

LEAST = 64
"""Tokens of the smallest micro-batch that is tried."""
WORTH_SAYING = 5.0
"""Seconds of a trial from which on they are printed."""


@dataclass(frozen=True, slots=True)
class Heaviest:
    """The composition of a run's heaviest micro-batch."""

    stream: Stream
    """Prompts and completions that fill the micro-batch."""
    longest: int
    """Tokens of the longest example, or of the longest prompt with its completion."""
    phase: str
    """Key of rlsloth.memory.out_of_memory.ADVICE."""
    most: int | None = None
    """Tokens of the largest step; None if it is unknown."""


def try_heaviest(
    policy: Policy,
    heaviest: Heaviest,
    budget: Budget,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Compute the gradients of a run's heaviest micro-batch, and drop them.

    Memory that runs out changes placements and the budget as in an update. Weights and random
    numbers are as before; the optimizer has its states, as it begins with.

    Args:
        policy: the policy; its gradients are empty.
        heaviest: composition of the micro-batch.
        budget: the number of tokens in a micro-batch; it is lowered to one that fits.
        say: prints a line.
        warn: prints a warning.

    Raises:
        RuntimeError: not even LEAST tokens fit (``is_out_of_memory``).
    """
    started = time.monotonic()
    tokens, placements = budget.tokens, policy.placements
    make = partial(_random_batch, heaviest.stream, policy.config.vocab_size)

    def shrink(batch: PackedBatch) -> PackedBatch | None:
        if batch.budget <= LEAST:
            return None
        # A budget below the longest sequence serves only steps without it.
        least = heaviest.longest if batch.budget > heaviest.longest else LEAST
        budget.tokens = max(batch.budget // 2, least)
        return make(budget.tokens)

    state = random_state(policy.device)
    try:
        accumulate(
            policy,
            make(min(tokens, heaviest.most or tokens)),
            partial(_forward_and_backward, policy),
            shrink,
            warn=lambda _: None,
        )
    finally:
        policy.optimizer.zero_grad(set_to_none=True)
        park(policy.optimizer)
        set_random_state(policy.device, state)
    seconds = time.monotonic() - started
    if (tokens, placements) != (budget.tokens, policy.placements):
        warn(
            f"GPU memory ran out when a micro-batch of {tokens} tokens was tried before the first "
            f"step; the run takes micro-batches of {budget.tokens} tokens with "
            f"{describe(policy.placements)}{_too_long(policy, heaviest, budget)}"
        )
    if seconds > WORTH_SAYING:
        say(f"trying the heaviest micro-batch took {seconds:.0f} s")


def _too_long(policy: Policy, heaviest: Heaviest, budget: Budget) -> str:
    if heaviest.longest <= budget.tokens:
        return ""
    return (
        f"; a sequence may have {heaviest.longest} tokens, and one that does not fit will end the "
        f"run: {advice(heaviest.phase, policy.model)}"
    )


def _forward_and_backward(policy: Policy, batch: PackedBatch) -> None:
    """Compute gradients with gradients and states allocated, as an update's last micro-batch."""
    for weight in policy.trained.values():
        weight.grad = torch.zeros_like(weight)
    reserve(policy.optimizer)
    park(policy.optimizer)
    for micro in batch.microbatches:
        out = policy.logprobs(to_device(micro, policy.device))
        policy.backward(out.logprobs.sum())
    if policy.device.type == "cuda":
        torch.cuda.synchronize()


def _random_batch(stream: Stream, vocabulary: int, tokens: int) -> PackedBatch:
    """Make one micro-batch of exactly so many random tokens, all of which are scored."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    tree = stream.prompt + stream.group * stream.completion
    groups: list[Group] = []
    left = tokens
    while left > 0:
        size = min(tree, left)
        # Beside a prompt there is a completion of at least one token.
        prompt = max(1, min(stream.prompt, size - 1))
        rest = size - prompt
        lengths: list[int] = []
        while rest > 0 or not lengths:
            lengths.append(min(stream.completion, rest))
            rest -= lengths[-1]
        # The model does not read a completion's last token.
        rollouts = [_rollout(draw(length + 1)) for length in lengths]
        groups.append(Group(Prompt(len(groups), "", {}), draw(prompt), rollouts))
        left -= size
    return pack(groups, tokens, mask_truncated=False, keep_zero_advantage=True)


def _rollout(ids: list[int]) -> Rollout:
    count = len(ids)
    return Rollout(ids, [True] * count, [0.0] * count, [0] * count, "length", "", [])
