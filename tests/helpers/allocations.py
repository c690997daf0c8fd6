"""Stand-ins for Triton kernels that allocate the tensors that those do in 16 bits on a GPU.

Numbers are meaningless, memory is not. Triton's interpreter is a hundred times slower, and in
float32, which is what a CPU multiplies fast, the gated unit is not fused.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from rlsloth.data.packing import pack
from rlsloth.kernels.measure import _peak_bytes_cpu
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, MicroBatch, Prompt, Rollout


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import rlsloth.kernels.adapted_glu.op as adapted_glu
    import rlsloth.kernels.rms_norm.op as rms_norm
    import rlsloth.kernels.rope.op as rope

    def norm(x, residual, weight, eps, offset):
        return torch.zeros_like(x), x if residual is None else x + residual

    def norm_backward(grad, grad_total, x, weight, eps, offset, with_weight):
        return torch.zeros_like(x), torch.zeros_like(weight) if with_weight else None

    def glu(tensors, activation, out):
        return out.new_zeros(out.shape[0], tensors[6].shape[0], dtype=torch.float32)

    def glu_backward(d_out, d_low, tensors, activation):
        return tuple(torch.zeros_like(x, dtype=torch.float32) for x in tensors[4:7])

    kernels = {"rms_norm": (norm, norm_backward), "adapted_glu": (glu, glu_backward)}
    for name, (forward, backward) in kernels.items():
        module = types.ModuleType(f"rlsloth.kernels.{name}.triton")
        vars(module).update(forward=forward, backward=backward)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(f"rlsloth.kernels.{name}.triton", module, raising=False)
    monkeypatch.setattr(rms_norm, "_by_triton", lambda x: True)
    monkeypatch.setattr(rope, "_rotate_torch", lambda *_: None)
    monkeypatch.setattr(adapted_glu, "fused", lambda _, adapters: adapters.gate_b_FR is not None)
    monkeypatch.setattr(adapted_glu, "glu_forward", lambda gate, up, activation, out: out)
    monkeypatch.setattr(adapted_glu, "glu_backward", lambda d_out, gate, up, _: (d_out, gate, up))


def stream(trees: int, prompt: int, completion: int, group: int) -> MicroBatch:
    """One micro-batch of ``trees`` prompts with ``group`` completions each, every one scored."""
    n = completion
    groups = [
        Group(
            Prompt(index, "", {}),
            [5] * prompt,
            [
                Rollout(
                    [7] * n, [True] * n, [-1.0] * n, [0] * n, "stop", "", [], advantages=[1.0] * n
                )
                for _ in range(group)
            ],
        )
        for index in range(trees)
    ]
    batch = pack(groups, 10**9, mask_truncated=False, keep_zero_advantage=False)
    return batch.microbatches[0]


def update_peak(policy: Policy, micro: MicroBatch) -> int:
    """Most bytes that a forward and backward hold beyond what was there before."""

    def run() -> None:
        policy.logprobs(micro).logprobs.sum().backward()

    run()  # the gradients are there before, as from the second micro-batch on
    return _peak_bytes_cpu(run)
