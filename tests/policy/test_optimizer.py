"""The optimizer's memory, allocated before an update so that the update cannot fail half-way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlsloth.config import OptimConfig
from rlsloth.errors import UserError
from rlsloth.policy import host_states
from rlsloth.policy.optimizer import (
    flatten_state,
    make_optimizer,
    park,
    reserve,
    restore_state,
)

SIZES = (5, 5000, 300, 9000)
"""Elements of tensors; 8-bit AdamW keeps small ones in float32."""


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in SIZES]


def make(
    weights: list[torch.nn.Parameter], name: str, *, offload: bool = False
) -> torch.optim.Optimizer:
    cfg = OptimConfig.model_validate({"name": name, "weight_decay": 0.1, "offload": offload})
    return make_optimizer(weights, cfg, torch.device("cpu"), 10)[0]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_states_that_are_made_before_are_those_that_the_update_makes(name: str) -> None:
    runs = []
    for reserved in (False, True):
        weights = parameters()
        optimizer = make(weights, name)
        generator = torch.Generator().manual_seed(1)
        for step in range(3):
            for weight in weights[: 2 if step == 0 else 4]:  # the last two have no gradient yet
                weight.grad = torch.randn(weight.shape, generator=generator)
            if reserved:
                reserve(optimizer)
            optimizer.step()
        tensors, scalars = flatten_state(optimizer)
        runs.append((weights, tensors, scalars))
    (weights, tensors, scalars), (ours, our_tensors, our_scalars) = runs
    assert our_scalars == scalars
    assert our_tensors.keys() == tensors.keys()
    assert all(torch.equal(our_tensors[key], value) for key, value in tensors.items())
    assert all(torch.equal(one, two) for one, two in zip(ours, weights, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_memory_that_runs_out_leaves_whole_states(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = made(name, lambda optimizer: reserve(optimizer))

    def interrupted(optimizer: torch.optim.Optimizer) -> None:
        zeros, calls = torch.zeros_like, 0

        def failing(x: torch.Tensor, **options: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 4:  # the second weight's second moment
                raise torch.OutOfMemoryError("CUDA out of memory")
            return zeros(x, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros_like", failing)
            with pytest.raises(torch.OutOfMemoryError):
                reserve(optimizer)
        assert len(optimizer.state) == 1
        reserve(optimizer)

    for one, two in zip(made(name, interrupted), wanted, strict=True):
        assert torch.equal(one, two)


def made(name: str, before: Callable[[torch.optim.Optimizer], None]) -> list[torch.nn.Parameter]:
    weights = parameters()
    optimizer = make(weights, name)
    for weight in weights:
        weight.grad = weight.detach().clone()
    before(optimizer)
    optimizer.step()
    return weights


@pytest.mark.parametrize(("began", "now"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_states_of_another_optimizer_are_refused(began: str, now: str) -> None:
    """``auto`` is another optimizer on another device."""
    weights = parameters()
    optimizer = make(weights, began, offload=False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(UserError, match=f"states of {began}, but .* pass --optim.name {began}"):
        restore_state(make(parameters(), now, offload=False), *flatten_state(optimizer))
    restore_state(make(parameters(), now, offload=False), {}, {})  # before the first update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [host_states.CHUNK_BYTES, 1, 12_000])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_states_in_host_memory_are_those_of_the_device(
    name: str, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a failed update, and in a checkpoint that either kind continues."""
    monkeypatch.setattr(host_states, "CHUNK_BYTES", chunk)

    def steps(
        optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        for step in range(3):
            for weight in weights[: 2 if step == 0 else 4]:
                weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
            if step != 1:
                reserve(optimizer)
            if step == 2:
                reserve(optimizer)  # gradients were computed again
            optimizer.step()

    found = []
    for first, second in ((False, False), (True, True), (True, False), (False, True)):
        weights = [torch.nn.Parameter(weight.to(dtype)) for weight in parameters()]
        optimizer = make(weights, name, offload=first)
        steps(optimizer, weights, 1)
        assert parked(optimizer) == first
        saved = flatten_state(optimizer)
        again = make(weights, name, offload=second)
        restore_state(again, *saved)
        assert parked(again) == second
        steps(again, weights, 2)
        found.append([*weights, *flatten_state(again)[0].values()])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def parked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all moments are views of one block."""
    moments = [
        x
        for weight, state in optimizer.state.items()
        for x in state.values()
        if isinstance(x, torch.Tensor) and x.numel() == weight.numel()
    ]
    return len({x.untyped_storage().data_ptr() for x in moments}) == 1


@pytest.mark.parametrize(
    ("moments", "most", "chunks"),
    [
        ([16, 16, 16], None, [(0, 3)]),
        ([16, 16, 16], 64, [(0, 2), (2, 3)]),
        ([1, 16, 400, 8], 64, [(0, 2), (2, 3), (3, 4)]),
        ([400], 64, [(0, 1)]),
    ],
)
def test_chunks_of_states(
    moments: list[int], most: int | None, chunks: list[tuple[int, int]]
) -> None:
    assert [(c.start, c.stop) for c in host_states.chunks_of(moments, most)] == chunks


def test_bytes_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_states, "CHUNK_BYTES", 20_000)
    for name, in_turn in (("adamw_8bit", True), ("adamw", False)):
        weights = parameters()
        optimizer = make(weights, name, offload=True)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        reserve(optimizer)
        held = sum(slot.room.nbytes for slot in optimizer.host_states._slots)  # type: ignore[attr-defined]
        eight = name == "adamw_8bit"
        planned = host_states.bytes_in_step(list(SIZES), in_8_bits=eight, in_turn=in_turn)
        assert held == planned


def test_two_chunks_are_on_the_device_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_states, "CHUNK_BYTES", 1)
    weights = parameters()
    optimizer = make(weights, "adamw_8bit", offload=True)
    host = optimizer.host_states  # type: ignore[attr-defined]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    seen = []
    bring = host.bring

    def watched(weight: torch.nn.Parameter) -> None:
        bring(weight)
        block = host._block.untyped_storage().data_ptr()
        moments = [x for w in weights for _, x, _ in host._states(w)]
        seen.append(sum(x.untyped_storage().data_ptr() != block for x in moments))

    monkeypatch.setattr(host, "bring", watched)
    optimizer.step()
    assert seen == [2] * len(weights)  # the current weight's; the next one's copy has begun
    assert host._slots == []


@pytest.mark.parametrize("then", [reserve, park])
def test_a_step_that_fails_half_way_harms_no_state(
    then: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_states, "CHUNK_BYTES", 1)
    weights = parameters()
    optimizer = make(weights, "adamw_8bit", offload=True)

    generator = torch.Generator().manual_seed(1)

    def with_gradients() -> None:
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)

    with_gradients()
    optimizer.step()
    before = {key: x.clone() for key, x in flatten_state(optimizer)[0].items()}
    bring = optimizer.host_states.bring  # type: ignore[attr-defined]

    def failing(weight: torch.nn.Parameter) -> None:
        bring(weight)
        if weight is weights[2]:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(optimizer.host_states, "bring", failing)  # type: ignore[attr-defined]
    with_gradients()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    then(optimizer)
    after = flatten_state(optimizer)[0]
    assert parked(optimizer)
    moments = [key for key in before if key.endswith(("state1", "state2"))]
    changed = {
        int(key.split(".")[0]) for key in moments if not torch.equal(before[key], after[key])
    }
    assert changed == {0, 1}


def test_queued_updates_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.optim import AdamW8bit

    ours, theirs = parameters(), parameters()
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    cfg = OptimConfig.model_validate({"name": "adamw_8bit", **options})
    queued = make_optimizer(ours, cfg, torch.device("cpu"), 10)[0]
    library = AdamW8bit(theirs, eps=1e-8, **options)
    assert isinstance(queued, AdamW8bit)
    assert type(queued) is not AdamW8bit
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        queued.step()
        library.step()
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    saved, other = flatten_state(queued), flatten_state(library)
    assert saved[1] == other[1]
    assert all(torch.equal(x, other[0][key]) for key, x in saved[0].items())


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_state_that_is_made_later_joins_those_in_host_memory(name: str) -> None:
    weights = parameters()
    optimizer = make(weights, name, offload=True)
    weights[1].grad = torch.ones_like(weights[1])
    reserve(optimizer)
    optimizer.step()
    assert parked(optimizer)
    weights[3].grad = torch.ones_like(weights[3])
    reserve(optimizer)
    assert parked(optimizer)
    park(optimizer)  # the update was skipped
    assert parked(optimizer)
    optimizer.step()
    assert parked(optimizer)
    assert optimizer.state[weights[1]]["step"] == 2
    assert optimizer.state[weights[3]]["step"] == 1
