"""Frozen decoder layers whose weights wait in host memory (``model.offload_layers``).

The GPU has two slots, each for one layer's weights: layer i uses slot i % 2. Its parameters are
views of that slot, made once, so that whatever kernels remember of a weight's place stays right.
While one layer is at work, the next one's weights are copied to the other slot, in a forward
upwards and in a backward downwards. After a forward the slots hold the last two of these layers,
with which the backward begins, and after a backward the first two.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlsloth.errors import UserError
from rlsloth.policy.activations.passes import current_pass
from rlsloth.policy.layers import base_of, decoder_layers
from rlsloth.policy.page_lock import host_block, lock, unlock

SLOTS = 2
"""Slots on the GPU: a layer at work, and the next one."""
ALIGNMENT = 256
"""Bytes to which each tensor in a slot is aligned, as torch's own allocations are."""
STREAMED = "rlsloth_streamed"
"""Name of the model's attribute that holds its StreamedLayers."""

Place = tuple[Any, str]
"""An object, and its attribute that holds a frozen tensor."""


class StreamedLayers:
    """Copies layers' weights from host memory to the slots before the layers need them.

    On a CPU the copies are made at once, so that tests compute exactly what a GPU computes.
    """

    def __init__(self, blocks: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
        """Start with empty slots.

        Args:
            blocks: the bytes of each layer's weights, in host memory.
            slots: the slots, each as large as the largest block that it takes.
        """
        self._blocks, self._slots = blocks, slots
        self._device = slots[0].device
        self._held: list[int | None] = [None] * len(slots)
        self._copied: list[torch.cuda.Event | None] = [None] * len(slots)
        self._side = None
        if self._device.type == "cuda":
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Return the number of layers in host memory."""
        return len(self._blocks)

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Let each layer wait for its weights, and ask for those of the next one."""
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before_forward, index))
            layer.register_forward_hook(partial(self._after_forward, index))

    def fetch(self, index: int) -> None:
        """Start copying a layer's weights, unless its slot holds them; ignore other numbers.

        The copy waits for all work queued so far, which may still read the slot.
        """
        if not 0 <= index < len(self._blocks):
            return
        slot, block = index % SLOTS, self._blocks[index]
        if self._held[slot] == index:
            return
        self._held[slot] = None
        target = self._slots[slot][: len(block)]
        if self._side is None:
            target.copy_(block)
        else:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                target.copy_(block, non_blocking=True)
                self._copied[slot] = self._side.record_event()
        self._held[slot] = index

    def ensure(self, index: int) -> None:
        """Let the work that follows wait until a layer's weights are in its slot."""
        self.fetch(index)
        if (copied := self._copied[index % SLOTS]) is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)

    def _before_forward(self, index: int, _layer: nn.Module, _args: Any) -> None:
        self.ensure(index)
        computed = current_pass()
        again = computed is not None and computed.again  # then the backward goes on downwards
        self.fetch(index - 1 if again else index + 1)

    def _after_forward(self, index: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        if current_pass() is not None:  # it runs again before its backward, with its weights
            return
        for x in output if isinstance(output, tuple) else (output,):
            if isinstance(x, Tensor) and x.requires_grad:
                # Autograd reads the weights of a layer that keeps its activations from the slot.
                hook = partial(self._before_backward, index)
                x.register_hook(hook)  # type: ignore[no-untyped-call]
        if not torch.is_grad_enabled() and index == len(self._blocks) - 1:
            for first in range(SLOTS):  # no backward follows: the next forward begins with these
                self.fetch(first)

    def _before_backward(self, index: int, _grad: Tensor) -> None:
        self.ensure(index)
        self.fetch(index - 1)


def streamed_layers(model: Any) -> int:
    """Return the number of a model's layers in host memory; PEFT's model or transformers' own."""
    base = base_of(model)
    return len(getattr(base, STREAMED, ()))


def refuse_more_layers(count: int, layers: int) -> None:
    """Refuse a value of ``model.offload_layers`` that is larger than the number of layers.

    Raises:
        UserError: it is larger.
    """
    if count > layers:
        raise UserError(
            f"--model.offload-layers {count}: the model has {layers} decoder layers; pass at most "
            f"{layers}"
        )


def stream_layers(
    model: Any, count: int, device: torch.device, say: Callable[[str], None] = print
) -> None:
    """Move a frozen model to its device, but its first layers' weights to page-locked host memory.

    The weights are matrices of any kind, also NF4 codes with their scales. Norms and biases are
    on the device. If the system refuses to page-lock memory, ordinary memory is used, and this is
    said.

    Args:
        model: transformers' model, not wrapped yet, on the CPU or on the device.
        count: number of layers, from the first one.
        device: the device.
        say: prints a line.

    Raises:
        UserError: the model has fewer layers.
    """
    layers = decoder_layers(model.get_decoder())
    refuse_more_layers(count, len(layers))
    shared = _shared(model)
    places = [list(_places(layer, shared)) for layer in layers[:count]]
    sizes = [sum(_room(getattr(*place)) for place in of_layer) for of_layer in places]
    slots = [
        torch.empty(max(sizes[first::SLOTS]), dtype=torch.uint8, device=device)
        for first in range(min(SLOTS, count))
    ]
    blocks, locked = [], list[Tensor]()
    for index, of_layer in enumerate(places):
        block = host_block(sizes[index])
        _move(of_layer, block, slots[index % SLOTS].data)
        blocks.append(block)
        if device.type == "cuda" and len(locked) == index and lock(block):
            locked.append(block)
    if device.type == "cuda" and len(locked) < count:
        say(
            "the system refuses page-locked memory (limit: ulimit -l): weights of "
            f"{count - len(locked)} layers are in ordinary memory, and copied more slowly"
        )
    nn.Module.to(model, device)
    streamed = StreamedLayers(blocks, slots)
    weakref.finalize(streamed, unlock, locked)
    streamed.attach(layers[:count])
    setattr(model, STREAMED, streamed)


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules have."""
    counts = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {key for key, count in counts.items() if count > 1}


def _places(layer: nn.Module, shared: set[int]) -> Iterator[Place]:
    """Yield the places of a layer's matrices."""
    for module in layer.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in shared:
                continue
            yield parameter, "data"
            state = getattr(parameter, "quant_state", None)
            if state is not None:  # with double quantisation absmax are the codes of the scales
                yield state, "absmax"


def _room(x: Tensor) -> int:
    return -(-x.nbytes // ALIGNMENT) * ALIGNMENT


def _move(places: Sequence[Place], block: Tensor, slot: Tensor) -> None:
    """Copy tensors to a block, and put views of a slot in their places.

    ``slot`` must be detached from the tensor that copies are written to: else each copy would count
    as a change of the weights, for autograd and for caches of dequantised matrices.
    """
    at = 0
    for place in places:
        x = getattr(*place)
        part = slice(at, at + x.nbytes)
        block[part].copy_(x.detach().contiguous().view(-1).view(torch.uint8))
        setattr(*place, slot[part].view(x.dtype).view(x.shape))
        at += _room(x)
