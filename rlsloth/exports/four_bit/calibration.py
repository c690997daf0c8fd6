"""Inputs of a model's linear layers on calibration texts, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlsloth.policy.layers import decoder_layers

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""A layer's further arguments."""


@dataclass(slots=True)
class Moments:
    """Sums over calibration tokens of products of a linear layer's inputs."""

    linear: nn.Linear
    sums: Tensor | None = field(default=None)
    """[I, I] float32; None before the first token."""

    def add(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add tokens: a hook before the layer's forward."""
        rows = inputs[0].detach().reshape(-1, self.linear.in_features).float()
        if self.sums is None:
            self.sums = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.sums.addmm_(rows.T, rows)


class _StopError(Exception):
    """Ends a forward pass once the first decoder layer has its input."""


class Walk:
    """The decoder layers in their order, each with the outputs of the changed layers before it."""

    def __init__(self, model: Any, batches: Sequence[Tensor]) -> None:
        """Compute the input of the first layer.

        Args:
            model: transformers' causal language model.
            batches: token ids [B, S], all of one shape, on the model's device.
        """
        self.layers = decoder_layers(model)
        self._arguments = _arguments(model, self.layers, batches[0])
        self._hidden = [_first_input(model, self.layers[0], batch) for batch in batches]

    @torch.no_grad()
    def steps(self) -> Iterator[tuple[int, dict[str, Moments]]]:
        """Yield each layer's number, and the moments of its linear layers by their names.

        The caller may change the layer's weights before it asks for the next one.
        """
        for number, layer in enumerate(self.layers):
            found = {n: Moments(m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
            hooks = [m.linear.register_forward_pre_hook(m.add) for m in found.values()]
            for hidden in self._hidden:
                self._run(number, hidden)
            for hook in hooks:
                hook.remove()
            yield number, found
            self._hidden = [self._run(number, hidden) for hidden in self._hidden]

    def _run(self, number: int, hidden: Tensor) -> Tensor:
        more, named = self._arguments[number]
        out = self.layers[number](hidden, *more, **named)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found


@torch.no_grad()
def _arguments(model: Any, layers: Sequence[nn.Module], ids: Tensor) -> list[Inputs]:
    """Return each layer's arguments besides its input, which are alike for texts of one length."""
    found: list[Inputs] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((inputs[1:], {k: v for k, v in named.items() if k != "past_key_values"}))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def _first_input(model: Any, layer: nn.Module, ids: Tensor) -> Tensor:
    found: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _StopError

    hook = layer.register_forward_pre_hook(stop)
    try:
        model(input_ids=ids, use_cache=False)
    except _StopError:
        pass
    finally:
        hook.remove()
    return found[0]
