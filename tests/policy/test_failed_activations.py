"""Failed forwards and failed copies of activations: they leave nothing behind."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from helpers.allocations import stream
from helpers.plans import make_policy
from rlsloth.policy.activations import arena, transfer
from rlsloth.policy.activations.passes import Pass
from rlsloth.policy.activations.placement import uniform
from rlsloth.policy.layers import decoder_layers
from rlsloth.policy.policy import Policy

pytestmark = pytest.mark.slow

MICRO = stream(2, 20, 15, 3)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.logprobs(MICRO).logprobs.sum().backward()
    found = policy.weights().tensors
    return {name: p.grad.clone() for name, p in found.items() if p.grad is not None}


@pytest.mark.parametrize("how", [True, "offload"])
def test_a_failed_forward_keeps_nothing(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is given back before gradients are computed again includes its layers'."""
    policy = make_policy("llama")
    policy.place(uniform(how, len(policy.placements)))
    want = gradients(policy)
    policy.optimizer.zero_grad(set_to_none=True)
    made: list[weakref.ref[Pass]] = []
    init = Pass.__init__

    def noted(layer: Pass, *arguments: Any) -> None:
        made.append(weakref.ref(layer))
        init(layer, *arguments)

    monkeypatch.setattr(Pass, "__init__", noted)
    with monkeypatch.context() as patch:
        patch.setattr(decoder_layers(policy.model)[-1].mlp, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy.logprobs(MICRO)
    assert len(made) == len(policy.placements)
    assert all(layer() is None for layer in made)
    assert all(torch.equal(want[name], found) for name, found in gradients(policy).items())


def test_a_failed_fetch_marks_nothing_as_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = transfer.Transfer(torch.device("cpu"), arena.HostArena(pinned=False))
    parked = copies.park([torch.ones(4), 2 * torch.ones(4)])
    copies.settle(parked)
    room = transfer.Parked.room

    def second_fails(one: transfer.Parked) -> torch.Tensor:
        if one is parked[1]:
            raise torch.OutOfMemoryError
        return room(one)

    with monkeypatch.context() as patch:
        patch.setattr(transfer.Parked, "room", second_fails)
        with pytest.raises(torch.OutOfMemoryError):
            copies.fetch(parked)
    assert [one.take().tolist() for one in parked] == [[1.0] * 4, [2.0] * 4]
