"""Attention backends on a GPU compared with plain SDPA in float32; decoding graphs."""

from __future__ import annotations

import pytest
import torch

from helpers.attention import attended
from helpers.attention_gpu import gpu_policy, logprobs_and_gradient
from helpers.policies import make_groups
from rlsloth.data.packing import pack, to_device
from rlsloth.policy.attention.backends import available_backends
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine


@pytest.fixture(scope="module")
def exact():
    return logprobs_and_gradient(gpu_policy("sdpa", torch.float32))


@pytest.mark.parametrize("backend", ["fa4", "cudnn", "varlen", "flex", "sdpa"])
def test_backend_agrees_with_float32(backend, exact):
    if backend not in available_backends():
        pytest.skip(f"{backend} is not installed")
    want, want_grad = exact
    got, grad = logprobs_and_gradient(gpu_policy(backend, torch.bfloat16))
    assert (got - want).abs().max() < 0.05
    assert (got - want).abs().mean() < 0.01
    assert torch.nn.functional.cosine_similarity(grad, want_grad, 0) > 0.999


def test_cudnn_reads_streams_of_every_length():
    """torch caches cuDNN's plans by shape: segments of one shape, in streams of several lengths."""
    for groups in (4, 1, 2):
        same = [make_groups(0, 1)[0] for _ in range(groups)]
        (micro,) = pack(same, 4000, mask_truncated=False, keep_zero_advantage=True).microbatches
        micro = to_device(micro, torch.device("cuda"))
        want = attended("sdpa", micro, torch.float32, "cuda")
        for got, expected in zip(
            attended("cudnn", micro, torch.bfloat16, "cuda"), want, strict=True
        ):
            assert (got - expected).norm() < 0.02 * expected.norm()


def test_graphed_decoding_equals_eager():
    policy = gpu_policy("sdpa", torch.float32)
    prompts = [[3, 5, 7], [11] * 20, [13, 17], [23] * 9]
    outs = []
    for graphs in (True, False):
        engine = TransformersEngine(
            policy.model, policy.tokenizer, stop_ids=[1], context=4096, max_sequences=12,
            device=policy.device, cuda_graphs=graphs,
        )  # fmt: skip
        sampling = SamplingParams(max_tokens=40, seed=3)
        first = engine.generate(prompts, 4, sampling)
        with policy.base_model():
            base = engine.generate(prompts, 4, sampling)
        again = engine.generate(prompts, 4, sampling)
        assert [c.token_ids for g in first for c in g] == [c.token_ids for g in again for c in g]
        outs.append((first, base))
    for graphed, eager in zip(*outs, strict=True):
        for a, b in zip(
            (c for g in graphed for c in g), (c for g in eager for c in g), strict=True
        ):
            assert a.token_ids == b.token_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert outs[0][0] != outs[0][1]
