"""Two runs in one process with vLLM, started from Python with a lambda as the reward."""

from __future__ import annotations

import gc
from pathlib import Path

from transformers import LlamaForCausalLM

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth import (
    EnvConfig,
    EvalConfig,
    GrpoConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    grpo,
)

ROWS = [{"question": f"Question {i}?", "answer": str(i)} for i in range(20)]


def test_two_runs_leave_no_model(workplace: Path) -> None:
    tokenizer = tiny_tokenizer()
    # vLLM's attention on a CPU takes heads of 32 numbers and more.
    tiny_llama(len(tokenizer), hidden=128).save_pretrained(workplace / "model")
    tokenizer.save_pretrained(workplace / "model")
    for name in ("one", "two"):
        config = GrpoConfig(
            steps=2,
            prompts_per_step=2,
            group_size=2,
            model=ModelConfig(path="model", device="cpu", max_context=128),
            env=EnvConfig(heldout=4),
            rollout=RolloutConfig(engine="vllm", max_tokens=8, max_sequences=8),
            reward=RewardConfig(workers=1),
            eval=EvalConfig(at_start=False, at_end=False),
            run=RunConfig(dir=workplace / name, show_samples=0),
        )
        run = grpo(config, rewards=[lambda completions: [1.0] * len(completions)], data=ROWS)
        assert [row["step"] for row in run.metrics] == [1, 2]
        assert gc.get_freeze_count() == 0  # what is frozen is in no list of objects
        gc.collect()
        assert not [item for item in gc.get_objects() if type(item) is LlamaForCausalLM]
