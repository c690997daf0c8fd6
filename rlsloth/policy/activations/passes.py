"""One layer in one forward pass: what it keeps for its backward, and the layer now at work."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor

from rlsloth.policy.activations.placement import Place, Placement
from rlsloth.policy.activations.transfer import Parked, Transfer

Kept = Tensor | Parked


class Pass:
    """One layer in one forward pass: what it keeps for its backward."""

    def __init__(
        self, placement: Placement, transfer: Transfer | None, before: Pass | None
    ) -> None:
        self.placement, self._transfer = placement, transfer
        self._before = before
        self._input: Kept | None = None
        self._kept: dict[str, tuple[Kept, ...]] = {}
        self.again = False
        """Whether the layer is being computed again."""
        self.knows_sum = False
        """Whether the second forward need not compute attention's output projection."""
        self.leaves_out_rest = False
        """Whether the MLP's last product is left out of the second forward: it saves nothing."""
        self.roots: tuple[Tensor, ...] | None = None
        """Tensors whose sum would be the output, if the second forward leaves out the rest."""
        self.linears: dict[object, Any] = {}
        """The linear layers that the first forward has read, for the second one."""

    def start(self, hidden: Tensor) -> None:
        """Begin the first forward; the layer before has ended, so its copies are due."""
        (self._input,) = self._keep((hidden.detach(),), self.placement.input)
        if self._before is not None:
            self._before.settle()

    def restart(self) -> Tensor:
        """Begin the second forward: return the layer's input, and fetch for the layer before."""
        self.again = True
        assert self._input is not None, "a layer's backward pass can run only once"
        hidden, self._input = _take(self._input), None
        if self._before is not None:
            self._before.fetch()
        self._before = None
        return hidden

    def keep(self, name: str, tensors: Sequence[Tensor], place: Place | None) -> None:
        """Keep tensors in the first forward, which must not be written to; None: keep nothing."""
        if place is not None and not self.again:
            self._kept[name] = self._keep(tuple(x.detach() for x in tensors), place)

    def take(self, name: str) -> tuple[Tensor, ...] | None:
        """Return tensors in the second forward; None in the first, and if they were not kept."""
        kept = self._kept.pop(name, None) if self.again else None
        return None if kept is None else tuple(_take(x) for x in kept)

    def settle(self) -> None:
        """Give the memory of tensors free that are on their way to the host."""
        if self._transfer is not None:
            self._transfer.settle(self._parked())

    def fetch(self) -> None:
        """Start copying back what is in host memory."""
        if self._transfer is not None:
            self._transfer.fetch(self._parked())

    def _keep(self, tensors: tuple[Tensor, ...], place: Place) -> tuple[Kept, ...]:
        if place == "device":
            return tensors
        assert self._transfer is not None
        return tuple(self._transfer.park(tensors))

    def _parked(self) -> list[Parked]:
        """List what leaves for host memory, in the order in which it was kept."""
        kept = (self._input, *chain(*self._kept.values()))
        return [one for one in kept if isinstance(one, Parked)]


def _take(kept: Kept) -> Tensor:
    return kept.take() if isinstance(kept, Parked) else kept


class _Current(threading.local):
    layer: Pass | None = None


_CURRENT = _Current()  # the backward pass, and so the second forward, has a thread of its own


def current_pass() -> Pass | None:
    """Return the checkpointed layer that is being computed in this thread."""
    return _CURRENT.layer


@contextmanager
def computing(layer: Pass) -> Iterator[None]:
    outer, _CURRENT.layer = _CURRENT.layer, layer
    try:
        yield
    finally:
        _CURRENT.layer = outer
