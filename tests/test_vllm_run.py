"""Whole runs with --rollout.engine vllm. Each starts vLLM anew, which takes half a minute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from test_smollm2 import gguf

from rlsloth import cli

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CONFIG = {
    "steps": 5,
    "prompts_per_step": 2,
    "group_size": 4,
    "model": {"device": "cpu", "gradient_checkpointing": False, "max_context": 256},
    "env": {"name": "reasoning_gym:chain_sum", "params": {"min_terms": 2, "max_terms": 2}},
    "rewards": ["./reward.py:short"],
    "rollout": {"engine": "vllm", "max_tokens": 12, "max_sequences": 16},
    "reward": {"workers": 1},
    "eval": {"at_start": False, "at_end": False, "problems": 2, "samples": 2},
    "optim": {"lr": 1e-3},
    "run": {"save_every": 0, "show_samples": 0},
}
REWARD = """
def short(completions, **_): return [float(len(c[0]["content"])) for c in completions]
"""


def test_five_steps_and_an_evaluation_of_what_they_trained(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {**CONFIG, "model": {**CONFIG["model"], "path": str(gguf())}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    Path("reward.py").write_text(REWARD)
    assert cli.main(["grpo", "config.yaml", "--run.dir", "run"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["grad_norm"] > 0 for row in rows)
    # The adapter that samples is the one that is trained, at every version.
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-3 for row in rows)
    arguments = ["run/config.yaml", "--model.adapter", "run/adapter", "--run.dir", "eval"]
    assert cli.main(["eval", *arguments]) == 0
    figures = json.loads(Path("eval/eval.json").read_text())
    assert {"base", "adapter", "difference"} <= figures.keys()
