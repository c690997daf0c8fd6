"""Layers computed twice: gradients of all inputs, repeated draws, and layers without a gradient."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlsloth.policy.activations.layers import Recomputed
from rlsloth.policy.activations.placement import Placement

CPU = torch.device("cpu")
CALLS: list[str] = []


class Layer(nn.Module):
    """A layer as transformers calls it, with further inputs, and a tuple as its output."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def __init__(self, name: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, gate: Tensor, **keywords: Any) -> tuple[Tensor, None]:
        CALLS.append(self.name)
        (bias, _), scale = keywords["pair"], keywords["options"]["scale"]
        return self.dropout(self.linear(hidden).tanh() * gate + bias * scale), None

    def __call__(self, hidden: Tensor, *rest: Any, **keywords: Any) -> Any:
        if self.gradient_checkpointing:
            return self._gradient_checkpointing_func(
                partial(self.forward, **keywords), hidden, *rest
            )
        return self.forward(hidden, *rest, **keywords)


def run(layers: list[Layer], *, again: bool, place: Any = "host") -> list[Tensor]:
    """Return the output, and the gradients of weights and of the layers' further inputs."""
    torch.manual_seed(0)
    hidden, gate, bias, scale = (torch.randn(3, 4) for _ in range(4))
    for x in (gate, bias, scale):
        x.requires_grad_()
    placements = (Placement(place) if again else None,) * len(layers)
    recomputed = Recomputed(layers, placements, CPU)
    torch.manual_seed(1)
    for layer in layers:
        pair = (bias.sin(), torch.ones(1))  # not a leaf
        hidden, _ = layer(hidden, gate, pair=pair, options={"scale": scale, "name": "x"})
    hidden.square().sum().backward()
    recomputed.close()
    weights = [p for layer in layers for p in layer.parameters()]
    found = [
        hidden.detach(),
        *(x.grad for x in (gate, bias, scale, *weights) if x.grad is not None),
    ]
    for p in weights:
        p.grad = None
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("place", ["device", "host"])
def test_gradients_of_every_input_are_those_of_one_forward(dropout: float, place: str) -> None:
    torch.manual_seed(2)
    layers = [Layer(str(i), dropout) for i in range(3)]
    once, twice = run(layers, again=False), run(layers, again=True, place=place)
    assert len(once) == len(twice) == 1 + 3 + 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    if dropout:  # later draws are those after one forward
        assert torch.get_rng_state().equal(state_after(layers))


def state_after(layers: list[Layer]) -> Tensor:
    run(layers, again=False)
    return torch.get_rng_state()


def test_layers_below_the_first_trained_one_run_once() -> None:
    layers = [Layer(str(i)) for i in range(3)]
    layers[0].requires_grad_(False)
    frozen = Recomputed(layers, (Placement("device"),) * 3, CPU)
    hidden, fixed = torch.randn(3, 4), torch.ones(3, 4)
    CALLS.clear()
    for layer in layers:
        hidden, _ = layer(hidden, fixed, pair=(fixed, fixed), options={"scale": fixed})
    hidden.sum().backward()
    frozen.close()
    assert CALLS == ["0", "1", "2", "2", "1"]
    assert all(p.grad is not None for layer in layers[1:] for p in layer.parameters())


def test_a_forward_without_backward_is_forgotten_at_the_next() -> None:
    """Also if the first layers are not trained; memory that ran out leaves such forwards."""
    layers = [Layer(str(i)) for i in range(3)]
    layers[0].requires_grad_(False)
    recomputed = Recomputed(layers, (Placement("device"),) * 3, CPU)
    alive: list[weakref.ref[Tensor]] = []
    fixed = torch.ones(3, 4)
    for _ in range(3):
        hidden = torch.randn(3, 4)
        for layer in layers:
            hidden, _ = layer(hidden, fixed, pair=(fixed, fixed), options={"scale": fixed})
            alive.append(weakref.ref(hidden.untyped_storage()))
        del hidden
        gc.collect()
    # The last forward has kept the inputs of two layers.
    assert sum(one() is not None for one in alive) <= 2
    recomputed.close()
