"""Copies of tensors between a GPU and host memory, beside the GPU's own work.

On a CPU the copies are made at once, so that tests compute exactly what a GPU computes.

Tensors that are copied together wait for the GPU's work once, and are there together. No copy waits
for copies in the other direction: slabs become free only after the GPU's work has waited for the
last copy that uses them (``Parked.take``), and new copies wait for that work.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from rlsloth.policy.activations.arena import SLAB, HostArena


class Transfer:
    """Two streams of copies, one in each direction, and the host memory that they fill.

    All calls must come from one stream of the GPU's work, from any thread.
    """

    def __init__(self, device: torch.device, arena: HostArena) -> None:
        self.device, self.arena = device, arena
        self._out = self._in = None
        self._main: torch.cuda.Stream | None = None
        """The stream of the GPU's work."""
        if device.type == "cuda":
            self._out, self._in = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def park(self, tensors: Iterable[Tensor]) -> list[Parked]:
        """Start copying tensors to the host.

        Their content must not change until ``settle``.
        """
        parked = [Parked(self, x.detach().contiguous()) for x in tensors]
        self._start(self._out, parked, Parked.copy_out)
        return parked

    def settle(self, parked: Sequence[Parked]) -> None:
        """Let the GPU's further work wait for the copies, and give the tensors' memory free.

        The tensors must have been parked in this order.
        """
        leaving = [one for one in parked if one.leaves]
        if leaving:
            self.wait(leaving[-1].done)  # the stream's copies end in order
        for one in leaving:
            one.leave()

    def fetch(self, parked: Iterable[Parked]) -> None:
        """Start copying contents back, behind the work queued so far."""
        away = [one for one in parked if not one.reclaim()]
        rooms = [one.room() for one in away]  # all or none, if memory runs out
        for one, room in zip(away, rooms, strict=True):
            one.return_to(room)
        self._start(self._in, away, Parked.copy_in)

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the GPU's further work wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _start(
        self,
        stream: torch.cuda.Stream | None,
        parked: Sequence[Parked],
        copy: Callable[[Parked], None],
    ) -> None:
        """Make copies on a stream after all work queued so far, with one event at their end."""
        if stream is None or not parked:
            for one in parked:
                copy(one)
            return
        self._main = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._main)
        with torch.cuda.stream(stream):
            for one in parked:
                copy(one)
            done = stream.record_event()
        for one in parked:
            one.done = done

    def abandon(self, slabs: list[Tensor]) -> None:
        """Take back the slabs of a tensor that nobody will take, such as after an error.

        The GPU's own work waits for all copies, because the tensor's memory is free from now on.
        """
        if self._main is not None:  # not the current one: garbage may be collected anywhere
            for stream in (self._out, self._in):
                assert stream is not None
                self._main.wait_stream(stream)
        self.arena.give(slabs)


class Parked:
    """A tensor whose content waits in host memory until it is taken back, once."""

    def __init__(self, transfer: Transfer, x: Tensor) -> None:
        self._transfer = transfer
        self._like = torch.empty_like(x, device="meta")
        self._slabs = transfer.arena.take(x.nbytes)
        self._abandoned = weakref.finalize(self, transfer.abandon, self._slabs)
        self._source: Tensor | None = x
        self._back: Tensor | None = None
        self.done: torch.cuda.Event | None = None
        """The end of the last copies that it was part of."""

    @property
    def leaves(self) -> bool:
        """Whether the tensor is still in the GPU's memory, too."""
        return self._source is not None

    def leave(self) -> None:
        """Give the tensor's memory free, for which its copy must have been waited for."""
        self._source = None

    def reclaim(self) -> bool:
        """Take the tensor itself back if it has not left; tell whether it is back or on its way."""
        if self._back is None:
            self._back = self._source
        return self._back is not None

    def room(self) -> Tensor:
        """Allocate the GPU's memory for the content, on the stream of the GPU's work."""
        return torch.empty_like(self._like, device=self._transfer.device)

    def return_to(self, room: Tensor) -> None:
        """Take the memory to which ``copy_in`` copies."""
        self._back = room

    def copy_out(self) -> None:
        """Queue the copy to the host on the current stream."""
        assert self._source is not None
        for piece, slab in self._pairs(self._source):
            slab.copy_(piece, non_blocking=True)

    def copy_in(self) -> None:
        """Queue the copy back on the current stream."""
        assert self._back is not None
        for piece, slab in self._pairs(self._back):
            piece.copy_(slab, non_blocking=True)

    def take(self) -> Tensor:
        """Return the tensor; the work that follows waits for its copy. The host's copy is gone."""
        self._transfer.fetch([self])
        self._transfer.wait(self.done)
        assert self._back is not None
        back, self._back = self._back, None
        self._source = None
        self._abandoned.detach()
        self._transfer.arena.give(self._slabs)
        return back

    def _pairs(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pair the pieces of a tensor with the slabs."""
        pieces = x.view(-1).view(torch.uint8).split(SLAB)  # type: ignore[no-untyped-call]
        slabs = (slab[: len(piece)] for slab, piece in zip(self._slabs, pieces, strict=True))
        return list(zip(pieces, slabs, strict=True))
