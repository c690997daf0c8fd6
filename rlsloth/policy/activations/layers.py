"""Decoder layers that are computed again in the backward pass, from inputs kept anywhere.

Activation checkpointing (Chen et al. 2016) keeps each layer's input and computes the layer again in
the backward pass. Here the plan decides layer by layer what is kept besides, and where: on the GPU,
or in host memory, from which it is fetched while the layer after it is at work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from rlsloth.policy.activations.arena import HostArena
from rlsloth.policy.activations.placement import Place, Placement, summary
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
        self._grad = False
        self.again = False
        """Whether the layer is being computed again."""
        self.knows_sum = False
        """Whether the second forward need not compute attention's output projection."""
        self.ends_early = False
        """Whether the rest of the second forward saves nothing for the backward, and is left out.

        The layer sets it. torch would end the second forward by an exception inside autograd's
        hooks, which some releases turn into a SystemError.
        """

    def start(self, hidden: Tensor) -> None:
        """Begin the first forward; the layer before has ended, so its copies are due."""
        self._input = self._keep(hidden.detach(), self.placement.input)
        self._grad = hidden.requires_grad
        if self._before is not None:
            self._before.settle()

    def restart(self) -> Tensor:
        """Begin the second forward: return the layer's input, and fetch for the layer before."""
        self.again = True
        assert self._input is not None, "a layer's backward pass can run only once"
        # A leaf: the second forward's graph serves only to save the tensors that the first one did.
        hidden, self._input = _take(self._input).requires_grad_(self._grad), None
        if self._before is not None:
            self._before.fetch()
        self._before = None
        return hidden

    def keep(self, name: str, tensors: Sequence[Tensor], place: Place | None) -> None:
        """Keep tensors in the first forward, which must not be written to; None: keep nothing."""
        if place is not None and not self.again:
            self._kept[name] = tuple(self._keep(x.detach(), place) for x in tensors)

    def take(self, name: str) -> tuple[Tensor, ...] | None:
        """Return tensors in the second forward; None in the first, and if they were not kept."""
        kept = self._kept.pop(name, None) if self.again else None
        return None if kept is None else tuple(_take(x) for x in kept)

    def settle(self) -> None:
        """Give the memory of tensors free that are on their way to the host."""
        for kept in self._parked():
            kept.settle()

    def fetch(self) -> None:
        """Start copying back what is in host memory."""
        for kept in self._parked():
            kept.fetch()

    def _keep(self, x: Tensor, place: Place) -> Kept:
        if place == "device":
            return x
        assert self._transfer is not None
        return self._transfer.park(x)

    def _parked(self) -> Iterator[Parked]:
        for kept in (self._input, *chain(*self._kept.values())):
            if isinstance(kept, Parked):
                yield kept


def _take(kept: Kept) -> Tensor:
    return kept.take() if isinstance(kept, Parked) else kept


class _Current(threading.local):
    layer: Pass | None = None


_CURRENT = _Current()  # the backward pass, and so the second forward, has a thread of its own


def current_pass() -> Pass | None:
    """Return the checkpointed layer that is being computed in this thread."""
    return _CURRENT.layer


@contextmanager
def _computing(layer: Pass) -> Iterator[None]:
    outer, _CURRENT.layer = _CURRENT.layer, layer
    try:
        yield
    finally:
        _CURRENT.layer = outer


class Recomputed:
    """Decoder layers that are computed again in the backward pass."""

    def __init__(
        self,
        layers: Sequence[Any],
        placements: Sequence[Placement | None],
        device: torch.device,
        say: Callable[[str], None] = print,
    ) -> None:
        """Let the layers be computed again.

        Args:
            layers: decoder layers (transformers' GradientCheckpointingLayer), in order.
            placements: one for each layer; None: the layer keeps all its activations.
            device: the layers' device.
            say: prints a line.
        """
        self._transfer: Transfer | None = None
        if summary(tuple(placements)) == "offload":
            arena = HostArena(pinned=device.type == "cuda", say=say)
            self._transfer = Transfer(device, arena)
        self._last: Pass | None = None
        for index, (layer, placement) in enumerate(zip(layers, placements, strict=True)):
            layer.gradient_checkpointing = placement is not None
            if placement is not None:
                layer._gradient_checkpointing_func = _Layer(
                    self, placement, first=index == 0, draws=_draws(layer)
                )

    def close(self) -> None:
        """Free the host's memory; no backward pass may be pending."""
        self._last = None
        if self._transfer is not None:
            self._transfer.arena.close()

    def run(
        self,
        placement: Placement,
        first: bool,
        draws: bool,
        forward: Callable[..., Any],
        hidden: Tensor,
        *rest: Any,
    ) -> Any:
        """Run a layer's first forward so that autograd keeps only what the placement says."""
        if not torch.is_grad_enabled():
            return forward(hidden, *rest)
        layer = Pass(placement, self._transfer, None if first else self._last)
        live: list[Tensor] = [hidden]

        def compute(layer: Pass) -> Any:
            with _computing(layer):
                return forward(live.pop() if live else layer.restart(), *rest)

        layer.start(hidden)
        del hidden
        # No tensor is an argument: the function above knows where the input is.
        with set_checkpoint_early_stop(False):  # Pass.ends_early
            out = checkpoint(compute, layer, use_reentrant=False, preserve_rng_state=draws)
        self._last = layer
        return out


@dataclass(frozen=True, slots=True)
class _Layer:
    owner: Recomputed
    placement: Placement
    first: bool
    draws: bool

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        return self.owner.run(self.placement, self.first, self.draws, forward, *args)


def _draws(layer: nn.Module) -> bool:
    """Tell whether a layer draws random numbers, which its second forward must repeat."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in layer.modules())
