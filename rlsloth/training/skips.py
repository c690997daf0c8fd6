"""Updates whose gradient is not finite: counted, their batches kept, a hopeless run ended."""

from __future__ import annotations

from pathlib import Path

import torch

from rlsloth.errors import UserError
from rlsloth.records import MicroBatch, PackedBatch
from rlsloth.run.run import Run


class Skips:
    """Count updates skipped in a row, keep their batches, and end a hopeless run."""

    in_a_row: int
    """Skipped since the last update that was made; checkpoints keep it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_a_row = 0

    def check(self, skipped: bool, batch: PackedBatch, run: Run, step: int) -> None:
        """Count a step. Raises UserError after too many skipped in a row."""
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        path = dump_batch(batch, run.dir / "skipped" / f"step_{step:05d}.safetensors")
        run.warn(f"step {step}: gradient not finite, nothing was updated; its batch is in {path}")
        if self.in_a_row >= self._limit:
            raise UserError(
                f"the gradient was NaN or infinite for {self.in_a_row} steps in a row; lower "
                f"--optim.lr, or look at {path}"
            )


def dump_batch(batch: PackedBatch, path: Path) -> Path:
    """Write a step's micro-batches as safetensors, names ``<micro-batch>.<field>``."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            f"{i}.{field}": value
            for i, micro in enumerate(batch.microbatches)
            for field in MicroBatch.__slots__
            if isinstance(value := getattr(micro, field), torch.Tensor)
        },
        path,
    )
    return path
