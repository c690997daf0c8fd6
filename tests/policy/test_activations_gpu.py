"""Placements of activations on a GPU: page-locked memory, side streams, attention in halves."""

from __future__ import annotations

import pytest
import torch

from helpers.attention_gpu import gpu_policy, logprobs_and_gradient
from rlsloth.policy.activations.placement import Placement
from rlsloth.policy.attention.backends import available_backends

PLACEMENTS = [
    Placement("device"),
    Placement("host"),
    Placement("device", "device"),
    Placement("host", "host"),
    Placement("device", "device", "device"),
    Placement("device", "device", "device", "device"),
    Placement("host", "host", "host"),
    Placement("host", "host", "host", "host"),
    Placement("host", attention_parts=2),
    Placement("host", "host", "host", "host", 2, 64),
]


@pytest.fixture(params=["fa4", "varlen"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in available_backends():
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


def test_every_placement_has_the_gradient_of_kept_activations(backend: str) -> None:
    policy = gpu_policy(backend, torch.bfloat16)

    def found(placement: Placement | None) -> tuple[torch.Tensor, torch.Tensor]:
        policy.place((placement,) * 2)
        policy.optimizer.zero_grad(set_to_none=True)
        return logprobs_and_gradient(policy)

    logprobs, grad = found(None)
    # Attention's backward adds in an order that differs from run to run.
    noise = float((found(None)[1] - grad).norm() / grad.norm())
    for placement in PLACEMENTS:
        for _ in range(3):  # memory of an earlier pass is used again
            again_logprobs, again = found(placement)
            error = float((again - grad).norm() / grad.norm())
            print(backend, placement, f"{error:.1e}, noise {noise:.1e}")
            if placement.mlp_rows is None:
                assert torch.equal(again_logprobs, logprobs), placement
            else:
                assert (again_logprobs - logprobs).abs().max() < 0.05, placement
            assert error < max(2 * noise, 1e-2 if placement.mlp_rows else 1e-3), placement


def test_host_memory_is_page_locked() -> None:
    policy = gpu_policy("varlen", torch.bfloat16)
    policy.place((Placement("host"),) * 2)
    logprobs_and_gradient(policy)
    transfer = policy._recomputed._transfer
    assert transfer is not None
    assert transfer.arena._locked
    before = transfer.arena.size
    for _ in range(3):
        logprobs_and_gradient(policy)
    assert transfer.arena.size == before
    assert all(slab.is_pinned() for slab in transfer.arena._free)
