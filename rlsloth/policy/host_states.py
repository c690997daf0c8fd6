"""Optimizer states that wait in host memory between updates (``optim.offload``).

They are needed only in the optimizer's step, which goes through the weights in order. The states of
a few weights at a time are on the GPU: those of the next ones come, and those before return, while
these are used. All are in one block of page-locked memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlsloth.errors import UserError
from rlsloth.policy.page_lock import host_block, lock, unlock

CHUNK_BYTES = 64 << 20
"""Bytes of states that are copied at once, unless one weight has more."""
SLOTS = 2
"""Chunks that are on the device at once: one is used, while another one comes."""
ALIGNMENT = 16
"""Bytes of which each state's place is a multiple, for vector loads."""
SMALL = 4096
"""Weights with fewer elements have float32 states, even with 8-bit AdamW (bitsandbytes)."""


def moment_bytes(elements: int, in_8_bits: bool) -> int:
    """Return the bytes of each of the two moments of a weight."""
    return elements * (1 if in_8_bits and elements >= SMALL else 4)


def chunks_of(moments: list[int], most: int | None) -> list[slice]:
    """Cut weights into chunks whose states have at most ``most`` bytes, or one weight.

    Args:
        moments: bytes of one of the two moments of each weight, in order.
        most: None: all weights are one chunk.
    """
    chunks, start, size = [], 0, 0
    for index, each in enumerate(moments):
        if most is not None and index > start and size + 2 * _room(each) > most:
            chunks.append(slice(start, index))
            start, size = index, 0
        size += 2 * _room(each)
    return [*chunks, slice(start, len(moments))]


def bytes_in_step(elements: list[int], *, in_8_bits: bool, in_turn: bool) -> int:
    """Return the bytes of states that are on the device at once; see ``HostStates``."""
    moments = [moment_bytes(count, in_8_bits) for count in elements]
    chunks = chunks_of(moments, CHUNK_BYTES if in_turn else None)
    most = max(sum(2 * _room(each) for each in moments[chunk]) for chunk in chunks)
    return min(SLOTS, len(chunks)) * most


@dataclass(eq=False, slots=True)
class _Chunk:
    weights: list[Parameter]
    part: slice
    """Its place in the block."""


@dataclass(eq=False, slots=True)
class _Slot:
    """Room on the device for a chunk's states."""

    room: Tensor
    chunk: int | None = None
    """The chunk whose states it has, or is receiving."""
    ready: Any = None
    """Event after the copy to the device."""
    free: Any = None
    """Event after the copy back."""


class HostStates:
    """An optimizer's moments, a few of which are on the weights' device during its step."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        in_8_bits: bool,
        in_turn: bool,
        say: Callable[[str], None] = print,
    ) -> None:
        """Let the states wait in host memory.

        Args:
            optimizer: AdamW of any kind.
            device: the weights' device.
            in_8_bits: whether its moments have 8 bits.
            in_turn: whether its step calls ``bring`` before it updates a weight; else all states
                are brought before the step.
            say: prints a line, if the system refuses to page-lock memory.
        """
        self._optimizer, self._device, self._say = optimizer, device, say
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = [moment_bytes(weight.numel(), in_8_bits) for weight in weights]
        self._places: dict[Parameter, tuple[int, int]] = {}
        """Weight -> its chunk's number, and its first byte in the block."""
        self._chunks: list[_Chunk] = []
        end = 0
        for number, chunk in enumerate(chunks_of(moments, CHUNK_BYTES if in_turn else None)):
            start = end
            for weight, each in zip(weights[chunk], moments[chunk], strict=True):
                self._places[weight] = number, end
                end += 2 * _room(each)
            self._chunks.append(_Chunk(weights[chunk], slice(start, end)))
        self._block: Tensor | None = None
        self._slots: list[_Slot] = []
        self._current: int | None = None
        self._streams: tuple[Any, Any] | None = None
        """For copies to the device, and back."""
        self._locked: list[Tensor] = []
        weakref.finalize(self, unlock, self._locked)
        optimizer.register_step_pre_hook(lambda *_: self._begin(in_turn))
        optimizer.register_step_post_hook(lambda *_: self.park())

    def reserve(self) -> None:
        """Allocate a step's memory on the device, so that the step finds it in torch's cache.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        if self._slots:  # copies of a step that has failed half-way may still run
            self.park()
        most = max(chunk.part.stop - chunk.part.start for chunk in self._chunks)
        count = min(SLOTS, len(self._chunks))
        rooms = [torch.empty(most, dtype=torch.uint8, device=self._device) for _ in range(count)]
        self._slots = [_Slot(room) for room in rooms]

    def bring(self, weight: Parameter) -> None:
        """Put a weight's states on the device, and begin to copy those of the next chunk."""
        number, _ = self._places[weight]
        if number == self._current:
            return
        self._leave()
        slot = self._slots[number % len(self._slots)]
        if slot.chunk != number:
            self._start(number)
        if self._streams is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.ready)
        self._current = number
        self._point(self._chunks[number], slot.room, self._chunks[number].part.start)
        if number + 1 < len(self._chunks):
            self._start(number + 1)

    def store(self, weight: Parameter) -> None:
        """Move a weight's states from the device to host memory, if they are new.

        Raises:
            UserError: the host has no memory left.
        """
        for key, x, at in self._new_states(weight):
            part = self._memory()[at : at + x.nbytes]
            part.copy_(x.view(-1).view(torch.uint8))
            self._optimizer.state[weight][key] = part.view(x.dtype).view(x.shape)

    def park(self) -> None:
        """Move all states to host memory, and free the device's; the host waits for the copies.

        Raises:
            UserError: the host has no memory left.
        """
        self._leave()
        if self._streams is not None:
            torch.cuda.synchronize(self._device)
        self._slots = []
        for weight in self._places:
            self.store(weight)

    def _begin(self, in_turn: bool) -> None:
        self.park()  # new states, and what a failed step has left
        self._memory()
        self.reserve()
        if self._device.type == "cuda" and self._streams is None:
            make: Any = torch.cuda.Stream
            self._streams = make(self._device), make(self._device)
        if not in_turn:
            self.bring(self._chunks[0].weights[0])

    def _start(self, number: int) -> None:
        """Begin to copy a chunk to its slot on the device."""
        slot, chunk = self._slots[number % len(self._slots)], self._chunks[number]
        slot.chunk, part = number, self._memory()[chunk.part]
        if self._streams is None:
            slot.room[: len(part)].copy_(part)
            return
        into = self._streams[0]
        if slot.free is None:  # the room may be memory that the main stream has just freed
            into.wait_stream(torch.cuda.current_stream(self._device))
        else:
            into.wait_event(slot.free)
        with torch.cuda.stream(into):
            slot.room[: len(part)].copy_(part, non_blocking=True)
        slot.ready = into.record_event()

    def _leave(self) -> None:
        """Begin to copy the current chunk back to its place in host memory."""
        if self._current is None:
            return
        chunk, slot = self._chunks[self._current], self._slots[self._current % len(self._slots)]
        part = self._memory()[chunk.part]
        if self._streams is None:
            part.copy_(slot.room[: len(part)])
        else:
            back = self._streams[1]
            back.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(back):
                part.copy_(slot.room[: len(part)], non_blocking=True)
            slot.free = back.record_event()
        self._point(chunk, self._memory(), 0)
        self._current = slot.chunk = None
        for weight in chunk.weights:
            if list(self._new_states(weight)):  # the copy wrote to their places, too
                if self._streams is not None:
                    self._streams[1].synchronize()
                self.store(weight)

    def _point(self, chunk: _Chunk, room: Tensor, start: int) -> None:
        """Let the states of a chunk be views of a room; new ones stay where they are."""
        for weight in chunk.weights:
            new = {key for key, *_ in self._new_states(weight)}
            for key, x, at in self._states(weight):
                if key not in new:
                    part = room[at - start : at - start + x.nbytes]
                    self._optimizer.state[weight][key] = part.view(x.dtype).view(x.shape)

    def _new_states(self, weight: Parameter) -> Iterator[tuple[str, Tensor, int]]:
        """Yield those of ``_states`` that the optimizer has made, or loaded, on the device."""
        rooms = {slot.room.data_ptr() for slot in self._slots}
        ours = rooms if self._block is None else {*rooms, self._block.data_ptr()}
        for key, x, at in list(self._states(weight)):
            if x.untyped_storage().data_ptr() not in ours:
                yield key, x, at

    def _states(self, weight: Parameter) -> Iterator[tuple[str, Tensor, int]]:
        """Yield the name of each moment of a weight, its tensor, and its place in the block."""
        at = self._places[weight][1]
        for key, x in sorted(self._optimizer.state.get(weight, {}).items()):
            if isinstance(x, Tensor) and x.numel() == weight.numel() > 1:
                yield key, x, at
                at += _room(x.nbytes)

    def _memory(self) -> Tensor:
        """Return the block, which is made when it is first needed."""
        if self._block is not None:
            return self._block
        size = self._chunks[-1].part.stop
        try:
            block = self._block = host_block(size)
        except OSError as error:
            raise UserError(
                f"the host has no {size >> 20} MiB of memory left for the optimizer's states "
                f"({error}); pass --optim.offload false"
            ) from error
        if self._device.type == "cuda":
            if lock(block):
                self._locked.append(block)
            else:
                self._say(
                    "the system refuses page-locked memory (limit: ulimit -l): the optimizer's "
                    "states are copied to ordinary memory, more slowly"
                )
        return block


def _room(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
