"""Copies of tensors between a GPU and host memory, beside the GPU's own work.

On a CPU the copies are made at once, so that tests compute exactly what a GPU computes.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from rlsloth.policy.activations.arena import SLAB, HostArena


class Transfer:
    """Two streams of copies, one in each direction, and the host memory that they fill."""

    def __init__(self, device: torch.device, arena: HostArena) -> None:
        self.device, self.arena = device, arena
        self._out = self._in = None
        if device.type == "cuda":
            self._out, self._in = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def park(self, x: Tensor) -> Parked:
        """Start copying a tensor to the host.

        Its content must not change until ``Parked.settle``.
        """
        return Parked(self, x)

    def _copy(self, pairs: list[tuple[Tensor, Tensor]], *, out: bool) -> torch.cuda.Event | None:
        """Copy sources to targets after all work queued so far; return the event of its end."""
        stream = self._out if out else self._in
        if stream is None:
            for source, target in pairs:
                target.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        # A slab may be read by the last copy in the other direction.
        stream.wait_stream(self._in if out else self._out)  # type: ignore[arg-type]
        with torch.cuda.stream(stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = stream.record_event()
            return event

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _abandon(self, slabs: list[Tensor]) -> None:
        """Take back the slabs of a tensor that nobody will take, such as after an error.

        The GPU's own work waits for all copies, because the tensor's memory is free from now on.
        """
        for stream in (self._out, self._in):
            if stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
        self.arena.give(slabs)


class Parked:
    """A tensor whose content waits in host memory until it is taken back, once."""

    def __init__(self, transfer: Transfer, x: Tensor) -> None:
        x = x.detach().contiguous()
        self._transfer = transfer
        self._like = torch.empty_like(x, device="meta")
        self._slabs = transfer.arena.take(x.nbytes)
        self._abandoned = weakref.finalize(self, transfer._abandon, self._slabs)
        self._source: Tensor | None = x
        self._back: Tensor | None = None
        self._done = transfer._copy(self._pairs(x, out=True), out=True)

    def settle(self) -> None:
        """Let the work that follows wait for the copy, and give the tensor's memory free."""
        if self._source is not None:
            self._transfer._wait(self._done)
            self._source = None

    def fetch(self) -> None:
        """Start copying the content back, behind the work queued so far."""
        if self._back is not None:
            return
        if self._source is not None:  # still on the GPU
            self._back, self._done = self._source, None
            return
        self._back = torch.empty_like(self._like, device=self._transfer.device)
        self._done = self._transfer._copy(self._pairs(self._back, out=False), out=False)

    def take(self) -> Tensor:
        """Return the tensor; the work that follows waits for its copy. The host's copy is gone."""
        self.fetch()
        self._transfer._wait(self._done)
        assert self._back is not None
        back, self._back = self._back, None
        self._source = None
        self._abandoned.detach()
        self._transfer.arena.give(self._slabs)
        return back

    def _pairs(self, x: Tensor, *, out: bool) -> list[tuple[Tensor, Tensor]]:
        """Pair the pieces of a tensor with the slabs, as sources and targets."""
        pieces = x.view(-1).view(torch.uint8).split(SLAB)  # type: ignore[no-untyped-call]
        slabs = [slab[: len(piece)] for slab, piece in zip(self._slabs, pieces, strict=True)]
        return list(zip(pieces, slabs, strict=True) if out else zip(slabs, pieces, strict=True))
