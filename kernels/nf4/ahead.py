"""Dequantise weights while another one is multiplied, and reuse matrices still held.

All weights share three buffers per stream, as large as the largest weight requested so far. All
weights of an op but its first are dequantised on a side stream, queued behind the first product:
their programs take the multiprocessors that the product's last wave, or a small product after it,
leaves idle. If a buffer still holds a weight's matrix in the same shape, it is reused: an MLP's
backward reuses those of its forward, or of the forward that activation checkpointing has just
repeated.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

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

    A matrix may be overwritten by the next call on the same stream: use it on that stream before,
    and do not change streams in between. Each stream runs one sequence of jobs at a time. Weights
    are identified by object: a weight with new codes must be a new ``Nf4Weight``.

    Each matrix is a new tensor without a GPU, for more than BUFFERS weights, and while a CUDA graph
    is captured (which must not depend on shared buffers that may grow later).
    """
    nf4 = [job for job in jobs if isinstance(job.weight, Nf4Weight)]
    on_gpu = bool(nf4) and nf4[0].weight.device.type == "cuda"
    if not on_gpu or len(nf4) > BUFFERS or _capturing():
        for job in jobs:
            yield _matrix(job)
        return
    device = nf4[0].weight.device
    main = torch.cuda.current_stream(device)
    key = device, main.cuda_stream
    if key not in _POOL:
        _POOL[key] = _Pool(device)
    pool = _POOL[key]
    taken = list(zip(nf4, pool.take(nf4), strict=True))
    aside = [(job, buffer) for job, buffer in taken[1:] if not buffer.holds(job)]
    later = {id(job) for job, _ in aside}
    # Every reader of a buffer was queued before this.
    free = main.record_event() if aside else None
    matrices = {id(job): buffer.matrix(job) for job, buffer in taken if id(job) not in later}
    for job in jobs:
        if not isinstance(job.weight, Nf4Weight):
            yield job.weight
            continue
        if id(job) not in matrices:
            with pool.beside(main, free):
                matrices |= {id(other): buffer.matrix(other) for other, buffer in aside}
        yield matrices[id(job)]


class _Views(NamedTuple):
    """A buffer as a job's matrix, and the parts of that."""

    matrix: Tensor
    weight: Tensor
    below: Tensor
    behind: Tensor


@dataclass(slots=True, eq=False)
class _Buffer:
    bytes: Tensor
    """uint8."""
    weight: weakref.ref[Nf4Weight] | None = None
    """The weight whose matrix, of this shape, the buffer holds."""
    shape: tuple[int, int] = (0, 0)
    _views: dict[tuple[object, ...], _Views] = field(default_factory=dict)

    def holds(self, job: Job) -> bool:
        return self.weight is not None and self.weight() is job.weight and self.shape == job.shape

    def grow(self, size: int) -> None:
        """Replace the buffer by a larger one."""
        self.weight = None
        self._views.clear()
        device = self.bytes.device
        self.bytes = self.bytes[:0].clone()  # frees the old one first
        with torch.inference_mode(False):  # usable outside it, too
            self.bytes = torch.empty(size, dtype=torch.uint8, device=device)

    def matrix(self, job: Job) -> Tensor:
        """Make a job's matrix on the current stream, if the buffer does not hold it."""
        assert isinstance(job.weight, Nf4Weight)
        key = job.shape, job.weight.shape, job.weight.dtype
        if (views := self._views.get(key)) is None:
            with torch.inference_mode(False):  # usable outside it, too
                matrix = self.bytes[: _bytes(job)].view(job.weight.dtype).view(job.shape)
                views = self._views[key] = _views_of(matrix, job.weight)
        held = self.holds(job)
        self.weight = None
        _fill(job, views, held)
        self.weight, self.shape = weakref.ref(job.weight), job.shape
        return views.matrix


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

    def take(self, jobs: Sequence[Job]) -> list[_Buffer]:
        """Return a buffer for each of at most BUFFERS jobs, with room for its matrix.

        It is the one that holds the matrix, else the least recently used one that no job finds its
        matrix in. This must come before the event after which the side stream may write: work
        queued earlier may still read memory that is new to this stream.
        """
        found = [next((b for b in self.buffers if b.holds(job)), None) for job in jobs]
        others = [buffer for buffer in self.buffers if buffer not in found]
        missing = [_bytes(job) for job, buffer in zip(jobs, found, strict=True) if buffer is None]
        for buffer in others[: len(missing)]:
            if buffer.bytes.numel() < max(missing):
                buffer.grow(max(missing))
        unused = iter(others)
        taken = [next(unused) if buffer is None else buffer for buffer in found]
        self.buffers = [*unused, *dict.fromkeys(taken)]
        return taken

    @contextmanager
    def beside(self, main: torch.cuda.Stream, free: torch.cuda.Event | None) -> Iterator[None]:
        """Queue work on the side stream after an event; the main stream's further work waits."""
        assert free is not None
        self.side.wait_event(free)
        try:
            with torch.cuda.stream(self.side):
                yield
        finally:
            main.wait_stream(self.side)


# By device and stream: one stream must not overwrite a matrix that another is multiplying.
_POOL: dict[tuple[torch.device, int], _Pool] = {}


def release_buffers() -> None:
    """Free the memory of all buffers; the next call allocates it again."""
    for pool in _POOL.values():
        pool.side.synchronize()
    _POOL.clear()


def _matrix(job: Job) -> Tensor:
    """Make a job's matrix in memory of its own."""
    weight = job.weight
    if not isinstance(weight, Nf4Weight):
        return weight
    matrix = torch.empty(job.shape, dtype=weight.dtype, device=weight.device)
    _fill(job, _views_of(matrix, weight), held=False)
    return matrix


def _views_of(matrix: Tensor, weight: Nf4Weight) -> _Views:
    out, into = weight.shape
    return _Views(matrix, matrix[:out, :into], matrix[out:, :into], matrix[:out, into:])


def _fill(job: Job, views: _Views, held: bool) -> None:
    """Write a job's matrix; of a held one only the factors, since adapters change meanwhile."""
    assert isinstance(job.weight, Nf4Weight)
    if not held:
        dequantize(job.weight, views.weight)
    if job.below_RI is not None:
        views.below.copy_(job.below_RI)
    if job.behind_OR is not None:
        views.behind.copy_(job.behind_OR)


def _bytes(job: Job) -> int:
    assert isinstance(job.weight, Nf4Weight)
    return job.shape[0] * job.shape[1] * job.weight.dtype.itemsize


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
