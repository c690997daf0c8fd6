"""Updates that are skipped because their gradient is not finite."""

from __future__ import annotations

from pathlib import Path

import torch

from rlsloth.errors import UserError
from rlsloth.files import replacing_file
from rlsloth.records import MicroBatch, PackedBatch
from rlsloth.run.run import Run

BEYOND_HALF = "pass --model.precision bf16 or fp32 (activations may exceed float16's 65504), "


class Skips:
    """Counts updates skipped in a row, saves their batches, and ends a run that only skips."""

    in_a_row: int
    """Number of updates skipped since the last one that was made; checkpoints keep it."""

    def __init__(self, limit: int, dtype: torch.dtype) -> None:
        """Count up to ``limit`` skipped updates of a policy that computes in ``dtype``."""
        self._limit = limit
        self._half = dtype == torch.float16
        self.in_a_row = 0

    def check(self, skipped: bool, batch: PackedBatch, run: Run, step: int) -> None:
        """Count a step. Raises UserError after ``optim.max_skipped`` skipped steps in a row."""
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        path = dump_batch(batch, run.dir / "skipped" / f"step_{step:05d}.safetensors")
        run.warn(
            f"step {step}: the gradient is NaN or infinite; update skipped, batch saved in {path}"
            f"{'; in fp16 the loss is now scaled by half as much' if self._half else ''}"
        )
        if self.in_a_row >= self._limit:
            raise UserError(
                f"the gradient was NaN or infinite for {self.in_a_row} steps in a row; lower "
                f"--optim.lr, {BEYOND_HALF if self._half else ''}or look at {path}"
            )


def dump_batch(batch: PackedBatch, path: Path) -> Path:
    """Write a step's micro-batches as safetensors with names ``<micro-batch>.<field>``."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{i}.{field}": value
        for i, micro in enumerate(batch.microbatches)
        for field in MicroBatch.__slots__
        if isinstance(value := getattr(micro, field), torch.Tensor)
    }
    with replacing_file(path) as temporary:
        save_file(tensors, temporary)
    return path
