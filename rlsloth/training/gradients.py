"""The gradients of a step's micro-batches, and its update, made again if memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from rlsloth.data.packing import longest_stream
from rlsloth.memory.machine import host_bytes
from rlsloth.memory.modes import most_frugal
from rlsloth.memory.out_of_memory import again, free_memory, is_out_of_memory
from rlsloth.policy.activations.arena import HostFullError, arena_bytes
from rlsloth.policy.activations.placement import describe, summary
from rlsloth.policy.optimizer import reserve
from rlsloth.policy.policy import Policy
from rlsloth.policy.random_state import random_state, set_random_state
from rlsloth.records import PackedBatch, StepStats

Result = TypeVar("Result")
Pack = Callable[[int], PackedBatch]
"""Function that packs a step's rollouts into micro-batches of at most so many tokens."""
Shrink = Callable[[PackedBatch], PackedBatch | None]
"""Function that packs a step again into smaller micro-batches; None: they cannot be smaller."""
Change = Callable[[PackedBatch], tuple[PackedBatch, str]]
"""Function that lowers the need of memory; it returns the step's micro-batches and a remark."""


@dataclass(slots=True)
class Budget:
    """The number of tokens in a micro-batch, which an out-of-memory lowers for the rest of a run.

    A resumed run begins with the plan's number again.
    """

    tokens: int

    def shrinking(self, pack: Pack) -> Shrink:
        """Return the function that lowers the budget and packs a step again.

        The budget is halved, but remains large enough for the step's longest rollout with its
        prompt, or for its largest group where groups stay whole.

        Args:
            pack: packs the step.
        """

        def shrink(batch: PackedBatch) -> PackedBatch | None:
            longest, least = longest_stream(batch), longest_stream(pack(1))
            if longest <= least:
                return None
            self.tokens = max(min(batch.budget, longest) // 2, least)
            return pack(self.tokens)

        return shrink


def accumulate(
    policy: Policy,
    batch: PackedBatch,
    compute: Callable[[PackedBatch], Result],
    shrink: Shrink = lambda _: None,
    warn: Callable[[str], None] = print,
) -> tuple[Result, PackedBatch]:
    """Compute the gradients of a step's micro-batches, again from the first one after a failure.

    The first time that memory runs out, nothing changes but that unused memory is given back:
    another program's or fragments may have taken it. The second time, activations are placed where
    they need the least of the GPU's memory, for the rest of the run. After that, micro-batches are
    made smaller, also where the host has no room for activations. Until then gradients are added up
    in the same order, so that the update is that of a run with enough memory.

    The memory of the optimizer's update is allocated here, too: it fails before anything changes.
    All micro-batches are computed again, since the failed one's backward pass has already added a
    part of its gradients to theirs: that costs time, and no memory for a copy.

    Args:
        policy: the policy; its gradients are empty.
        batch: the step's micro-batches.
        compute: runs forward and backward of all micro-batches. A call that fails must leave
            nothing but gradients behind.
        shrink: packs the step again into smaller micro-batches.
        warn: prints a warning.

    Returns:
        The result of ``compute``, and the micro-batches of which it is.

    Raises:
        RuntimeError: memory ran out with the smallest micro-batches (``is_out_of_memory``).
    """
    state = random_state(policy.device)
    failures, host_full = 0, False
    while True:
        try:
            result = compute(batch)
            reserve(policy.optimizer)
            return result, batch
        except HostFullError:
            change = _leave_host(policy, shrink)
            if change is None:
                raise
            place, host_full = "host", True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            place, failures = "GPU", failures + 1
            change = _next_change(policy, batch, shrink, failures, host_full)
            if change is None:
                raise
        # Here rather than above: the exception's traceback holds the failed call's tensors.
        policy.optimizer.zero_grad(set_to_none=True)
        free_memory()
        batch, remark = change(batch)
        warn(f"{place} memory ran out in the update; its gradients are computed again{remark}")
        set_random_state(policy.device, state)


def update_weights(policy: Policy, warn: Callable[[str], None] = print) -> StepStats:
    """Make the optimizer's update, again if memory runs out before it has changed anything.

    That is the case until the gradients' norm is known. From there on an update is not made again:
    weights and moments that have changed would change twice, and without a copy they cannot be
    restored. Hardly anything is allocated there: ``accumulate`` has reserved what the optimizer
    takes. If that fails all the same, the run ends, and resumes from its newest checkpoint.
    """

    def state() -> tuple[int, int]:
        return policy.version, policy.scheduler.last_epoch

    before = state()
    return again(
        policy.step, "the norm of the gradients", warn, unchanged=lambda: state() == before
    )


def _next_change(
    policy: Policy, batch: PackedBatch, shrink: Shrink, failures: int, host_full: bool
) -> Change | None:
    """Choose what to change after so many failures of an update; None: nothing is left."""
    if failures == 1:
        return lambda batch: (batch, "")
    frugal = most_frugal(policy.backend, len(policy.placements))
    if policy.placements != frugal and not host_full and _host_has_room(policy, batch):

        def place(batch: PackedBatch) -> tuple[PackedBatch, str]:
            policy.place(frugal)
            return batch, f", from now on with {describe(frugal)}: this is slower"

        return place
    smaller = shrink(batch)
    if smaller is None:
        return None
    return lambda _: (smaller, f", from now on in micro-batches of {smaller.budget} tokens")


def _leave_host(policy: Policy, shrink: Shrink) -> Change | None:
    """Keep layer inputs on the GPU, in smaller micro-batches; None: they are there already."""
    if summary(policy.placements) != "offload":
        return None
    kept = tuple(
        None
        if p is None
        else replace(p, input="device", attention=None, projections=None, sum=None)
        for p in policy.placements
    )

    def place(batch: PackedBatch) -> tuple[PackedBatch, str]:
        policy.place(kept)
        smaller = shrink(batch) or batch
        return smaller, f", from now on with {describe(kept)}, {smaller.budget} tokens at a time"

    return place


def _host_has_room(policy: Policy, batch: PackedBatch) -> bool:
    """Tell whether layer inputs of the largest micro-batch fit into host memory."""
    tokens = max((len(micro.token_ids) for micro in batch.microbatches), default=0)
    size = tokens * int(policy.config.hidden_size) * policy.dtype.itemsize
    return arena_bytes([(size, len(policy.placements))]) <= host_bytes()
