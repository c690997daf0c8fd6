"""GPU memory after a run from Python: given back, whether the run ends well or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlsloth import (
    EnvConfig,
    EvalConfig,
    GrpoConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    grpo,
)
from rlsloth.run.run import Run

KEPT_BYTES = 2**20
"""Small buffers that stay for the next call."""
ROWS = [{"question": f"Question {i}?", "answer": str(i)} for i in range(20)]


def train(model: Path, folder: Path) -> Any:
    config = GrpoConfig(
        steps=2,
        prompts_per_step=2,
        group_size=2,
        model=ModelConfig(path=str(model)),
        env=EnvConfig(heldout=4),
        rollout=RolloutConfig(engine="transformers", max_tokens=8),  # vLLM: test_training_vllm.py
        eval=EvalConfig(at_start=False, at_end=False),
        run=RunConfig(dir=folder),
    )
    return grpo(config, rewards=[lambda completions: [1.0] * len(completions)], data=ROWS)


def held() -> int:
    """Bytes of tensors, without cuBLAS's workspaces: 32 MiB for each stream on a Hopper GPU."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_memory_is_given_back(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model_folder, tmp_path / "one")
    first = held()
    assert first < KEPT_BYTES
    train(model_folder, tmp_path / "two")
    assert held() <= first

    def fail(self: Run, step: int, metrics: Any) -> None:
        raise RuntimeError("step 1")

    monkeypatch.setattr(Run, "log", fail)
    with pytest.raises(RuntimeError, match="step 1") as caught:
        train(model_folder, tmp_path / "three")
    assert caught.value.__traceback__ is not None  # held, as by a notebook
    assert held() <= first
