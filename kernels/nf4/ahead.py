"""Dequantising the next weight while the current one is multiplied.

All weights share two buffers a stream, as large as the largest weight asked for so far. The next
weight is dequantised on a side stream, queued behind the current product: its programs take the
multiprocessors that the product's last wave, or a small product after it, leaves idle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlsloth.kernels.nf4.op import Nf4Weight, dequantize


@dataclass(frozen=True, slots=True)
class Job:
    """A weight to make a matrix of, with room for more rows and columns behind it."""

    weight: Tensor | Nf4Weight
    more_rows: int = 0
    more_columns: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix with the room."""
        return self.weight.shape[0] + self.more_rows, self.weight.shape[1] + self.more_columns


def dequantize_ahead(jobs: Sequence[Job]) -> Iterator[Tensor]:
    """Each job's matrix [O + more_rows, I + more_columns] in turn; what is more is undefined.

    A matrix is overwritten once the next one is asked for: use it on the current stream before
    that, and do not change streams in between. A plain tensor is handed on as it is, without room.

    Without a GPU, and while a CUDA graph is captured (which must not depend on shared buffers that
    may grow later), each matrix is a tensor of its own.
    """
    nf4 = [job for job in jobs if isinstance(job.weight, Nf4Weight)]
    if not nf4 or nf4[0].weight.device.type != "cuda" or _capturing():
        for job in jobs:
            yield _matrix(job, None)
        return
    device = nf4[0].weight.device
    main = torch.cuda.current_stream(device)
    buffers = _POOL.setdefault((device, main.cuda_stream), _Buffers(device))
    # An op that was left early may still be dequantising.
    main.wait_stream(buffers.side)
    buffers.reserve(nf4)
    free, turn = main.record_event(), 0
    for job in jobs:
        if not isinstance(job.weight, Nf4Weight):
            yield job.weight
            continue
        if turn == 0:
            matrix = _matrix(job, buffers.bytes[0])
        else:
            # The other buffer was last read before the previous turn; the product just queued
            # reads this turn's predecessor, and must not be waited for.
            buffers.side.wait_event(free)
            free = main.record_event()
            with torch.cuda.stream(buffers.side):
                matrix = _matrix(job, buffers.bytes[turn % 2])
            main.wait_stream(buffers.side)
        turn += 1
        yield matrix


@dataclass(slots=True)
class _Buffers:
    device: torch.device
    side: torch.cuda.Stream = field(init=False)
    bytes: list[Tensor] = field(init=False)
    """uint8, two."""

    def __post_init__(self) -> None:
        self.side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.bytes = [torch.empty(0, dtype=torch.uint8, device=self.device) for _ in range(2)]

    def reserve(self, jobs: Sequence[Job]) -> None:
        """Room for the largest of the jobs: in both buffers if there are two jobs or more.

        Allocated before the event after which the side stream may write: memory new to this
        stream may still be read by what was queued earlier.
        """
        size = max(_bytes(job) for job in jobs)
        for index in range(min(2, len(jobs))):
            if self.bytes[index].numel() < size:
                self.bytes[index] = self.bytes[index][:0].clone()  # lets go of the old one first
                with torch.inference_mode(False):  # what is made inside stays there
                    self.bytes[index] = torch.empty(size, dtype=torch.uint8, device=self.device)


# By device and stream: what one stream multiplies, another must not overwrite.
_POOL: dict[tuple[torch.device, int], _Buffers] = {}


def _matrix(job: Job, buffer: Tensor | None) -> Tensor:
    weight = job.weight
    if not isinstance(weight, Nf4Weight):
        return weight
    if buffer is None:
        matrix = torch.empty(job.shape, dtype=weight.dtype, device=weight.device)
    else:
        matrix = buffer[: _bytes(job)].view(weight.dtype).view(job.shape)
    dequantize(weight, matrix[: weight.shape[0], : weight.shape[1]])
    return matrix


def _bytes(job: Job) -> int:
    assert isinstance(job.weight, Nf4Weight)
    return job.shape[0] * job.shape[1] * job.weight.dtype.itemsize


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
