"""Layers computed again from inputs on the device or in host memory: bit-equal to kept ones."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from helpers.allocations import stand_in, stream, update_peak
from helpers.families import FAMILIES
from helpers.plain_attention import plain_backward, plain_forward
from helpers.plans import make_policy
from rlsloth.kernels.lora import products as products_module
from rlsloth.policy.activations import arena, transfer
from rlsloth.policy.activations.layers import Recomputed
from rlsloth.policy.activations.placement import Placement, describe
from rlsloth.policy.attention.backend import Backend, Halves
from rlsloth.policy.attention.backends import BACKENDS
from rlsloth.policy.attention.kept import attend_in_halves
from rlsloth.policy.attention.layout import PackedLayout, Sequences
from rlsloth.policy.layers import decoder_layers
from rlsloth.policy.policy import Policy

pytestmark = pytest.mark.slow

MICRO = stream(2, 20, 15, 3)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.logprobs(MICRO).logprobs.sum().backward()
    found = {}
    for name, p in policy.weights().tensors.items():
        assert p.grad is not None
        found[name], p.grad = p.grad, None
    return found


def policy_with(family: str, checkpointing: Any) -> Policy:
    torch.manual_seed(0)
    policy = make_policy(family, checkpointing)
    with torch.no_grad():  # PEFT starts B at zero, which would hide A's gradient
        for name, p in policy.weights().tensors.items():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_and_recomputed_are_kept(family: str) -> None:
    kept, recomputed, offloaded = (
        gradients(policy_with(family, how)) for how in (False, True, "offload")
    )
    for name, grad in kept.items():
        assert torch.equal(grad, recomputed[name]), name
        assert torch.equal(grad, offloaded[name]), name


def test_tensors_of_several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "SLAB", 4096)
    monkeypatch.setattr(arena, "BLOCK", 16 * 4096)
    monkeypatch.setattr("rlsloth.policy.activations.transfer.SLAB", 4096)
    kept = gradients(policy_with("llama", False))
    policy = policy_with("llama", "offload")
    for _ in range(2):
        for name, grad in gradients(policy).items():
            assert torch.equal(grad, kept[name]), name
    transfer = policy._recomputed._transfer
    assert transfer is not None
    assert len(transfer.arena._free) * 4096 == transfer.arena.size  # all slabs are back


def test_a_forward_without_backward_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_with("llama", "offload")
    gradients(policy)
    transfer = policy._recomputed._transfer
    assert transfer is not None
    size = transfer.arena.size
    policy.logprobs(MICRO)
    gc.collect()
    assert transfer.arena.size == size
    assert len(transfer.arena._free) * arena.SLAB == size  # before the next forward begins
    gradients(policy)
    assert transfer.arena.size == size


def test_of_inputs_in_host_memory_two_are_on_the_device() -> None:
    """The one of the layer at work, and the one of the layer before, on its way back."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        peaks = [update_peak(policy_with("llama", how), MICRO) for how in (True, "offload")]
    policy = policy_with("llama", True)
    row = int(policy.config.hidden_size) * 4
    layers = len(decoder_layers(policy.model))
    assert peaks[0] - peaks[1] == (layers - 2) * len(MICRO.token_ids) * row


# --- attention in two halves ---------------------------------------------------------------------


CALLS: list[int] = []
"""Number of heads in each call of the forward."""


def counted(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    CALLS.append(q.shape[1])
    return plain_forward(q, k, v, sequences, scale)


HALVES = Halves(counted, plain_backward)


@pytest.fixture
def plain_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedLayout, scale: float
    ) -> torch.Tensor:
        return attend_in_halves(q, k, v, HALVES, packed, scale)

    monkeypatch.setitem(BACKENDS, "plain", Backend("plain", attend, works=lambda: True))
    CALLS.clear()


def test_both_forwards_attend_as_with_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernels, and those of plain.py, depend on whether a gradient is needed."""
    seen: list[bool] = []

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedLayout, scale: float
    ) -> torch.Tensor:
        seen.append(torch.is_grad_enabled() and q.requires_grad)
        return BACKENDS["sdpa"].attend(q, k, v, packed, scale)

    monkeypatch.setitem(BACKENDS, "probe", Backend("probe", attend, works=lambda: True))
    policy = policy_with("llama", True)
    policy.backend = "probe"
    gradients(policy)
    assert seen == [True] * 6
    policy.eval_logprobs(MICRO)
    assert seen == [True] * 6 + [False] * 3


@pytest.mark.parametrize("input_place", ["device", "host"])
@pytest.mark.parametrize("attention", [None, "device", "host"])
@pytest.mark.parametrize("parts", [1, 2])
def test_attention_is_kept(
    plain_halves: None, input_place: Any, attention: Any, parts: int
) -> None:
    def found(placements: list[Placement | None]) -> dict[str, torch.Tensor]:
        policy = policy_with("llama", False)
        policy.backend = "plain"
        layers = decoder_layers(policy.model)
        policy._recomputed = Recomputed(layers, placements, policy.device)
        return gradients(policy)

    reference = gradients(policy_with("llama", False))
    everything = found([None] * 3)
    CALLS.clear()
    kept = found([Placement(input_place, attention, attention_parts=parts)] * 3)
    assert len(CALLS) == 3 * 2 * (2 if attention is None else 1)
    for name, grad in kept.items():
        if parts == 1:
            assert torch.equal(grad, everything[name]), name
        torch.testing.assert_close(grad, reference[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "phi3", "gemma3_text", "granite", "qwen3_moe", "gpt_oss"]
)
def test_results_of_linear_layers_are_kept(
    plain_halves: None, family: str, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_with(family, False)
    policy.backend = "plain"
    want = gradients(policy)
    products = count_products(monkeypatch)
    for placement, left_out in (
        (Placement(place, place), 0),
        (Placement(place, place, place), 3 * 3 if family != "granite" else 0),
        (Placement(place, place, place, place), 4 * 3 if family != "granite" else 0),
    ):
        policy.place((placement,) * 3)
        products.clear()
        kept = gradients(policy)
        if placement.projections is None or left_out == 0:
            whole = len(products)
        elif family != "phi3":  # it has one linear layer for queries, keys and values
            assert len(products) == whole - left_out
        for name, grad in kept.items():
            torch.testing.assert_close(grad, want[name], rtol=1e-5, atol=1e-6, msg=name)


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that grows by one with each product with a frozen weight in a forward."""
    calls: list[Any] = []
    for name in ("frozen", "with_low"):
        whole = getattr(products_module, name)

        def counted(*args: Any, whole: Any = whole) -> torch.Tensor:
            calls.append(args[2])
            return whole(*args)

        monkeypatch.setattr(products_module, name, counted)
    return calls


def test_a_description_says_how_many_inputs_are_in_host_memory() -> None:
    host, device = Placement("host"), Placement()
    assert "inputs of 3 layers in host memory" in describe((host,) * 3 + (device,))
    assert describe((host,) * 2).endswith("inputs in host memory")
    assert describe((host, None)) == "1 of 2 layers recomputed, inputs in host memory"


@pytest.mark.parametrize("slab", [64, 4096, 1 << 20])
def test_host_memory_is_counted_in_slabs_and_blocks(
    slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "SLAB", slab)
    monkeypatch.setattr(transfer, "SLAB", slab)
    monkeypatch.setattr(arena, "BLOCK", 4 * slab)
    policy = policy_with("llama", "offload")
    gradients(policy)
    size = len(MICRO.token_ids) * policy.config.hidden_size * policy.dtype.itemsize
    transferred: Any = policy._recomputed._transfer
    layers = len(decoder_layers(policy.model))
    held = transferred.arena.size
    assert held == arena.arena_bytes([(size, layers)])
    assert held >= layers * size
    assert held % (4 * slab) == 0
