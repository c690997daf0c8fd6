"""Updates that are skipped because their gradient is not finite."""

from __future__ import annotations

from pathlib import Path

import torch

from rlsloth.errors import UserError
from rlsloth.files import replacing_file
from rlsloth.records import MicroBatch, PackedBatch
from rlsloth.run.run import Run


class Skips:
    """Counts updates skipped in a row, saves their batches, and ends a run that only skips."""

    in_a_row: int
    """Number of skipped updates that count since the last one made; checkpoints keep it."""

    def __init__(self, limit: int, wider: str = "") -> None:
        """Begin to count.

        Args:
            limit: ``optim.max_skipped``.
            wider: for a run in float16, the precisions with larger numbers.
        """
        self._limit, self._wider = limit, wider
        self.in_a_row = 0

    def check(
        self, skipped: bool, batch: PackedBatch, run: Run, step: int, *, scale: float = 1.0
    ) -> None:
        """Count a step.

        While the loss's factor in float16 can still fall, a skipped update is no sign of trouble,
        and is not counted.

        Args:
            skipped: whether an update of the step was skipped.
            batch: the step's micro-batches.
            run: the run.
            step: number of the step.
            scale: the loss's factor from now on; 1 if the loss is not scaled.

        Raises:
            UserError: ``optim.max_skipped`` updates in a row were skipped.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += scale <= 1
        path = dump_batch(batch, run.dir / "skipped" / f"step_{step:05d}.safetensors")
        run.warn(
            f"step {step}: the gradient is NaN or infinite; update skipped, batch saved in {path}"
            f"{f'; in fp16 the loss is scaled by {scale:g} from now on' if scale > 1 else ''}"
        )
        if self.in_a_row >= self._limit:
            wider = f"pass --model.precision {self._wider}, " if self._wider else ""
            raise UserError(
                f"the gradient was NaN or infinite for {self.in_a_row} steps in a row; lower "
                f"--optim.lr, {wider}or look at {path}"
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
