"""Memory that runs out in an update: the gradients are those of a run with enough memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from helpers.policies import make_groups, make_policy
from rlsloth.data.packing import pack
from rlsloth.policy.policy import Policy
from rlsloth.records import MicroBatch, PackedBatch, TokenLogprobs
from rlsloth.training.gradients import accumulate
from rlsloth.training.sft import update

pytestmark = pytest.mark.slow

BATCH = pack(make_groups(1, groups=6), 60, mask_truncated=False, keep_zero_advantage=True)


def adapter_after(
    monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...], dropout: float = 0.0
) -> tuple[dict[str, torch.Tensor], Any, list[str], Policy]:
    """Make an update in which these calls of the forward, or of the backward, run out of memory."""
    policy, calls = make_policy(dropout=dropout), 0
    warnings: list[str] = []
    logprobs = policy.logprobs

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def run_out(micro: MicroBatch) -> TokenLogprobs:
        nonlocal calls
        calls += 1
        found = logprobs(micro)
        if calls in failing:
            if calls % 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            found.logprobs = Fails.apply(found.logprobs)
        return found

    monkeypatch.setattr(policy, "logprobs", run_out)
    torch.manual_seed(0)
    metrics, _ = update(policy, BATCH, warnings.append)
    return (
        {n: p.detach().clone() for n, p in policy.weights().tensors.items()},
        metrics,
        warnings,
        policy,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("failing", [(1,), (2,), (3,), (2, 4), (3, 6)])
def test_the_update_is_that_of_a_run_with_memory(
    monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...], dropout: float
) -> None:
    assert len(BATCH.microbatches) >= 3
    undisturbed, metrics, none, _ = adapter_after(monkeypatch, (), dropout)
    found, disturbed_metrics, warnings, policy = adapter_after(monkeypatch, failing, dropout)
    assert not none
    assert len(warnings) == len(failing)
    assert "memory ran out" in warnings[0]
    assert ("inputs in host memory" in warnings[-1]) is (len(failing) == 2)
    assert all(p is None for p in policy.placements) is (len(failing) == 1)
    assert disturbed_metrics == metrics
    for name, tensor in undisturbed.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("CUDA error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_memory_runs_out_in_other_libraries_than_torch(text: str, repeated: bool) -> None:
    policy, calls = make_policy(), 0

    def compute(batch: PackedBatch) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError(text)
        return calls

    warnings: list[str] = []
    with nullcontext() if repeated else pytest.raises(RuntimeError, match="mat1"):
        result, batch = accumulate(policy, BATCH, compute, warn=warnings.append)
        assert (result, batch) == (2, BATCH)
    assert len(warnings) == repeated


def test_a_third_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        adapter_after(monkeypatch, (1, 3, 5))
