"""An exported adapter in a stock vLLM, as in `vllm serve --enable-lora`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.gguf_models import unpack_smollm2
from helpers.policies import make_groups
from helpers.trained_runs import make_base, make_run, micro_batch
from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow


def check_logprobs(base: Path, tmp_path: Path, size: float) -> None:
    policy = make_run(tmp_path / "run", base, size=size)
    micro = micro_batch()
    want = policy.eval_logprobs(micro)
    with policy.base_model():
        assert (policy.eval_logprobs(micro) - want).abs().mean() > 0.1  # the adapter shows
    del policy
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "adapter")]) == 0
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(base),
        dtype="float32",
        max_model_len=256,
        enable_lora=True,
        max_lora_rank=8,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    groups = make_groups(3)
    got = []
    for g, i in micro.source:
        prompt, rollout = groups[g].prompt_ids, groups[g].rollouts[i]
        ids = prompt + rollout.token_ids
        (out,) = llm.generate(
            {"prompt_token_ids": ids},
            SamplingParams(max_tokens=1, prompt_logprobs=0),
            lora_request=LoRARequest("sums", 1, str(tmp_path / "adapter")),
            use_tqdm=False,
        )
        got += [
            out.prompt_logprobs[len(prompt) + j][ids[len(prompt) + j]].logprob
            for j, on in enumerate(rollout.loss_mask)
            if on
        ]
    gap = (torch.tensor(got) - want).abs()
    print(f"mean {gap.mean():.2g}, max {gap.max():.2g}")
    assert gap.mean() <= 1e-3


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setitem(os.environ, "VLLM_CPU_KVCACHE_SPACE", "1")


def test_vllm_gives_the_trainers_logprobs(tmp_path: Path) -> None:
    # Heads that vLLM knows.
    wide: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 256}
    check_logprobs(make_base(tmp_path / "base", **wide), tmp_path, size=0.05)


@pytest.mark.long
def test_smollm2(tmp_path: Path) -> None:
    check_logprobs(unpack_smollm2(tmp_path / "base"), tmp_path, size=0.01)
