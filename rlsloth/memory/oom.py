"""Out of GPU memory: say in one line which setting to turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlsloth.records import UserError

ADVICE = {
    "rollout": "lower --rollout.max-sequences or --rollout.max-tokens",
    "update": "lower --tokens-per-microbatch (the gradient stays the same) or "
    "--rollout.max-sequences (its key-value cache stays allocated), leave "
    "--model.gradient-checkpointing on",
}


@contextmanager
def advise(phase: str) -> Iterator[None]:
    """Turn torch's out-of-memory error in a phase (a key of ADVICE) into a UserError with
    advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
        raise UserError(
            f"GPU memory ran out during the {phase} ({free:.1f} of {total:.1f} GiB free): "
            f"{ADVICE[phase]}, or load the base in 4 bits with --model.precision nf4"
        ) from error
