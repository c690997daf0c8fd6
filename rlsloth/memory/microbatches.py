"""Sizes of a micro-batch that a plan chooses from."""

from __future__ import annotations

from rlsloth.config import MICROBATCH
from rlsloth.memory.workload import Request

SIZES = (
    *range(65536, 16384, -8192), *range(16384, 8192, -2048), *range(8192, 4096, -1024),
    *range(4096, 0, -512),
)  # fmt: skip
"""Tokens of a micro-batch, for most runs."""


def microbatch_sizes(request: Request, least: int) -> list[int]:
    """List the sizes of a micro-batch to choose from, the largest one first.

    Args:
        request: the run; a named ``tokens_per_microbatch`` is the only size.
        least: smallest possible number of tokens in a micro-batch.
    """
    if request.tokens_per_microbatch is not None:
        return [request.tokens_per_microbatch]
    if request.overlap:
        return [max(MICROBATCH, least)]
    most = max(request.most_tokens or SIZES[0], least)
    wanted = (*SIZES, *_sharing_sizes(request, least))
    sizes = {min(max(tokens, least), most) for tokens in wanted}
    if request.samples is not None and request.longest_example is not None:
        one = request.longest_example  # micro-batches hold whole examples
        sizes = {max(tokens // one * one, least) for tokens in sizes}
    return sorted(sizes, reverse=True)


def _sharing_sizes(request: Request, least: int) -> list[int]:
    """List the sizes that hold several completions of a group beside a long prompt.

    The prompt is computed again in each micro-batch that holds a part of its group. Twice as many
    completions beside it save less than a twentieth where they are 16 times its length.
    """
    if request.sampling is None:
        return []
    workload = request.sampling.workload
    completion, group = max(1, least - workload.longest_prompt), workload.group_size
    counts = {*(1 << power for power in range(1, group.bit_length())), group}
    return [
        workload.longest_prompt + count * completion
        for count in counts
        if count * completion <= 16 * workload.longest_prompt
    ]
