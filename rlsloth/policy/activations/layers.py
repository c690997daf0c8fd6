"""Decoder layers that are computed again in the backward pass, from inputs kept anywhere.

Activation checkpointing (Chen et al. 2016) keeps each layer's input and computes the layer again in
the backward pass. Here the plan decides layer by layer what is kept besides, and where: on the GPU,
or in host memory, from which it is fetched while the layer after it is at work.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlsloth.policy.activations.arena import HostArena
from rlsloth.policy.activations.passes import Pass
from rlsloth.policy.activations.placement import Placement, summary
from rlsloth.policy.activations.transfer import Transfer
from rlsloth.policy.activations.twice import Twice, compute_twice


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
        self._last: weakref.ref[Pass] | None = None
        """The layer before in this forward. The graph owns it: what a failed one kept is freed."""
        for index, (layer, placement) in enumerate(zip(layers, placements, strict=True)):
            layer.gradient_checkpointing = placement is not None
            if placement is not None:
                layer._gradient_checkpointing_func = _Layer(
                    self, placement, index == 0, draws=_draws(layer), trains=_trains(layer)
                )

    def close(self) -> None:
        """Free the host's memory; no backward pass may be pending."""
        self._last = None
        if self._transfer is not None:
            self._transfer.arena.close()

    def run(
        self, at: _Layer, forward: Callable[..., Any], hidden: Tensor, rest: tuple[Any, ...]
    ) -> Any:
        """Run a layer's first forward so that autograd keeps only what the placement says."""
        if at.first:  # what failed forwards have left
            self._last = None
        if not torch.is_grad_enabled() or not (at.trains or hidden.requires_grad):
            return forward(hidden, *rest)
        before = None if self._last is None else self._last()
        layer = Pass(at.placement, self._transfer, before)
        layer.start(hidden)
        twice = Twice(layer, forward, rest, draws=at.draws, with_input=hidden.requires_grad)
        out = compute_twice(twice, hidden)
        self._last = weakref.ref(layer)
        return out


@dataclass(frozen=True, slots=True)
class _Layer:
    owner: Recomputed
    placement: Placement
    first: bool
    draws: bool
    """Whether it draws random numbers, which its second forward must repeat."""
    trains: bool
    """Whether it has weights that are trained."""

    def __call__(self, forward: Callable[..., Any], hidden: Tensor, *rest: Any) -> Any:
        return self.owner.run(self, forward, hidden, rest)


def _draws(layer: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in layer.modules())


def _trains(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters())
