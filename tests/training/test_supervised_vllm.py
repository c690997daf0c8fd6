"""vLLM in runs on examples: it solves held-out problems, and samples a teacher's traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.supervised import SFT, command, evaluations, make_folder
from helpers.tiny import tiny_llama
from rlsloth.cli import main as cli

REWARD = """
def exact(completions, answer, **_):
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]
"""
PROBLEMS = ["--rewards", "./reward.py:exact", "--env.train", "d.jsonl", "--env.heldout", "3"]
VLLM = ["--rollout.engine", "vllm"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    make_folder(tmp_path, d=SFT)
    tiny_llama(hidden=128).save_pretrained(tmp_path / "model")  # heads that vLLM knows
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_held_out_problems_are_answered_between_updates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its cache is given back for the updates, and taken again with the newest adapter."""
    more = ["--eval.generate", "--eval.every", "40", "--eval.samples", "1", *PROBLEMS, *VLLM]
    more += ["--env.validation", "d.jsonl", "--eval.temperature", "0", "--rollout.max-tokens", "12"]
    more += ["--steps", "120", "--optim.lr", "0.003", "--data.heldout", "1", "--lora.rank", "16"]
    more += ["--lora.alpha", "32", "--tokens-per-microbatch", "400"]
    assert command("sft", "d", *more) == 0
    assert "vLLM: key-value cache" in capsys.readouterr().out
    accuracies = [row["eval_avg@1"] for row in evaluations_by_sampling()]
    assert len(accuracies) == 4
    assert accuracies[0] == 0
    assert accuracies[-1] > 0.5
    assert len(evaluations()) == 4


def evaluations_by_sampling() -> list[dict[str, float]]:
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_avg@1" in row]


def test_a_teacher_in_vllm_and_then_a_student() -> None:
    more = ["--traces.correct-at", "0", "--traces.samples", "2", "--rollout.max-tokens", "60"]
    more += ["--student.model.path", "model", "--student.steps", "2", "--student.data.heldout", "1"]
    distill = ["distill", "--model.path", "model", *PROBLEMS, *VLLM, *more]
    assert cli.main([*distill, "--out", "out", "--train-student"]) == 0
    rows = [json.loads(line) for line in Path("out/train.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["provenance"]["teacher"]["kind"] == "local" for row in rows)
    assert Path("out/student/adapter/adapter_model.safetensors").is_file()
