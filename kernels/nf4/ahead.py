"""Dequantise the next weight while the current one is multiplied, and reuse matrices still held.

All weights share three buffers per stream, as large as the largest weight requested so far. The
next weight is dequantised on a side stream, queued behind the current product: its programs take
the multiprocessors that the product's last wave, or a small product after it, leaves idle. If a
buffer still holds a weight's matrix in the same shape, it is reused: an MLP's backward reuses those
of its forward, or of the forward that activation checkpointing has just repeated.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlsloth.kernels.nf4.op import Nf4Weight, dequantize

BUFFERS = 3  # an MLP has three weights


@dataclass(frozen=True, slots=True)
class Job:
    """A weight to dequantise, and factors to put below it or behind it in the same matrix."""

    weight: Tensor | Nf4Weight
    below_RI: Tensor | None = None  # noqa: N815 -- fields carry shape suffixes too
    behind_OR: Tensor | None = None  # noqa: N815

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix with both factors; the corner between them is undefined."""
        rows = 0 if self.below_RI is None else self.below_RI.shape[0]
        columns = 0 if self.behind_OR is None else self.behind_OR.shape[1]
        return self.weight.shape[0] + rows, self.weight.shape[1] + columns


def dequantize_ahead(jobs: Sequence[Job]) -> Iterator[Tensor]:
    """Yield each job's matrix ([W | behind] over below); a plain tensor is yielded unchanged.

    A matrix may be overwritten once the next one is requested: use it on the current stream before
    that, and do not change streams in between. Each stream runs one sequence of jobs at a time.
    Weights are identified by object: a weight with new codes must be a new ``Nf4Weight``.

    Without a GPU, and while a CUDA graph is captured (which must not depend on shared buffers that
    may grow later), each matrix is a new tensor.
    """
    nf4 = [job for job in jobs if isinstance(job.weight, Nf4Weight)]
    if not nf4 or nf4[0].weight.device.type != "cuda" or _capturing():
        for job in jobs:
            yield _matrix(job, None, held=False)
        return
    device = nf4[0].weight.device
    main = torch.cuda.current_stream(device)
    key = device, main.cuda_stream
    if key not in _POOL:
        _POOL[key] = _Pool(device)
    pool = _POOL[key]
    # An op that was interrupted may still be dequantising.
    main.wait_stream(pool.side)
    pool.reserve(nf4)
    # Every reader of a buffer was queued before this, or is recorded as its last use below.
    free, first = main.record_event(), True
    last_use: dict[int, torch.cuda.Event] = {}
    for job in jobs:
        if not isinstance(job.weight, Nf4Weight):
            yield job.weight
            continue
        buffer = pool.take(job)
        held = buffer.holds(job)
        buffer.weight = None
        if held or first:
            matrix = _matrix(job, buffer.bytes, held)
        else:
            # The product just queued reads another buffer: do not wait for it.
            pool.side.wait_event(last_use.get(id(buffer), free))
            with torch.cuda.stream(pool.side):
                matrix = _matrix(job, buffer.bytes, held)
            main.wait_stream(pool.side)
        buffer.weight, buffer.shape, first = weakref.ref(job.weight), job.shape, False
        yield matrix
        last_use[id(buffer)] = main.record_event()


@dataclass(slots=True, eq=False)
class _Buffer:
    bytes: Tensor
    """uint8."""
    weight: weakref.ref[Nf4Weight] | None = None
    """The weight whose matrix, of this shape, the buffer holds."""
    shape: tuple[int, int] = (0, 0)

    def holds(self, job: Job) -> bool:
        return self.weight is not None and self.weight() is job.weight and self.shape == job.shape


@dataclass(slots=True)
class _Pool:
    device: torch.device
    side: torch.cuda.Stream = field(init=False)
    buffers: list[_Buffer] = field(init=False)
    """The buffers, the most recently used one last."""

    def __post_init__(self) -> None:
        self.side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        empty = [torch.empty(0, dtype=torch.uint8, device=self.device) for _ in range(BUFFERS)]
        self.buffers = [_Buffer(tensor) for tensor in empty]

    def reserve(self, jobs: Sequence[Job]) -> None:
        """Allocate buffers for the jobs that are not held, each as large as the largest of them.

        This must come before the event after which the side stream may write: work queued earlier
        may still read memory that is new to this stream. Held matrices become the most recently
        used, so that the other jobs do not take their buffers.
        """
        held = [buffer for buffer in self.buffers if any(buffer.holds(job) for job in jobs)]
        others = [buffer for buffer in self.buffers if buffer not in held]
        self.buffers = others + held
        missing = [job for job in jobs if not any(buffer.holds(job) for buffer in held)]
        if len(jobs) > BUFFERS:  # held matrices may be overwritten, and made again
            missing = list(jobs)
        size = max((_bytes(job) for job in missing), default=0)
        for buffer in self.buffers[: len(missing)]:
            if buffer.bytes.numel() < size:
                buffer.weight = None
                buffer.bytes = buffer.bytes[:0].clone()  # frees the old one first
                with torch.inference_mode(False):  # usable outside it, too
                    buffer.bytes = torch.empty(size, dtype=torch.uint8, device=self.device)

    def take(self, job: Job) -> _Buffer:
        """Return the buffer that holds a job's matrix, else the least recently used one."""
        held = [buffer for buffer in self.buffers if buffer.holds(job)]
        buffer = held[0] if held else self.buffers[0]
        self.buffers.remove(buffer)
        self.buffers.append(buffer)
        return buffer


# By device and stream: one stream must not overwrite a matrix that another is multiplying.
_POOL: dict[tuple[torch.device, int], _Pool] = {}


def release_buffers() -> None:
    """Free the memory of all buffers; the next call allocates it again."""
    for pool in _POOL.values():
        pool.side.synchronize()
    _POOL.clear()


def _matrix(job: Job, buffer: Tensor | None, held: bool) -> Tensor:
    weight = job.weight
    if not isinstance(weight, Nf4Weight):
        return weight
    if buffer is None:
        matrix = torch.empty(job.shape, dtype=weight.dtype, device=weight.device)
    else:
        matrix = buffer[: _bytes(job)].view(weight.dtype).view(job.shape)
    out, into = weight.shape
    if not held:
        dequantize(weight, matrix[:out, :into])
    # Adapters change while a weight is held.
    if job.below_RI is not None:
        matrix[out:, :into].copy_(job.below_RI)
    if job.behind_OR is not None:
        matrix[:out, into:].copy_(job.behind_OR)
    return matrix


def _bytes(job: Job) -> int:
    assert isinstance(job.weight, Nf4Weight)
    return job.shape[0] * job.shape[1] * job.weight.dtype.itemsize


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
