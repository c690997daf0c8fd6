"""Fixtures: the vLLM engine on SmolLM2-135M-Instruct in float32, with the policy that it copies."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

from helpers.smollm2 import load
from helpers.vllm_engines import QUESTIONS, chat, make
from rlsloth.policy.policy import Policy
from rlsloth.records import SamplingParams
from rlsloth.rollout.vllm.engine import VllmEngine


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load("fp32")


@pytest.fixture(scope="module")
def engine(policy) -> Iterator[VllmEngine]:
    """Starts without a network, and must leave this process as it was."""

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"vLLM went to {address}")

    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        engine = make(policy)
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is set_num_threads
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="no adapter is loaded"):
        engine.generate([[5]], 1, SamplingParams(1))
    engine.set_weights(policy.weights())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prefixes(policy) -> list[list[int]]:
    return [chat(policy, question) for question in QUESTIONS]
