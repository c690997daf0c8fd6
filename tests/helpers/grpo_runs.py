"""GRPO runs on a tiny random model: the configuration, the command, and the figures they leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.tiny import save_sampled_model
from rlsloth.cli import main as cli

REWARD = """
import os, signal

LETTERS = range(67, 93)  # the ids of a to z

def letters(completion_ids, **_):
    return [sum(t in LETTERS for t in ids) / len(ids) for ids in completion_ids]

def flat(completions, **_):
    return [0.5] * len(completions)
"""
FATAL = """
import os, pathlib, signal
from reward import letters as share

def letters(completion_ids, trainer_state, **_):
    struck = pathlib.Path("struck")
    if trainer_state.global_step == 6 and not struck.exists():
        struck.touch()
        os.kill(int(pathlib.Path("killed/.lock").read_text()), signal.SIGKILL)
    return share(completion_ids)
"""
CONFIG = {
    "steps": 6,
    "prompts_per_step": 4,
    "group_size": 4,
    "updates_per_rollout": 2,
    "tokens_per_microbatch": 200,
    "rewards": ["./reward.py:letters"],
    "model": {"path": "model", "device": "cpu"},
    "lora": {"rank": 4, "dropout": 0.1},
    "env": {"train": "data.jsonl", "heldout": 6},
    "rollout": {"max_tokens": 16, "temperature": 0.9},
    "reward": {"workers": 1},
    "optim": {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.01},
    "eval": {"samples": 4, "correct_at": 0.2},
    "run": {"save_every": 2, "keep": 3, "show_samples": 1},
}
NO_EVAL = ("--eval.at-start", "false", "--eval.at-end", "false")
QUICK = (*NO_EVAL, "--optim.warmup-steps", "0", "--steps", "2")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data, rewards and a configuration; it is the working directory."""
    folder = tmp_path_factory.mktemp("work")
    save_sampled_model(folder / "model")
    rows = [{"question": f"Question {i}?", "answer": str(i)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "fatal.py").write_text("import sys; sys.path.insert(0, '.')\n" + FATAL)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a run in another process is compared bit by bit
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    torch.set_num_threads(threads)


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(workplace: Path) -> Train:
    """Runs the command; returns the run folder."""

    def run(name: str, *flags: str, status: int = 0) -> Path:
        assert cli.main(["grpo", "config.yaml", "--run.dir", name, *flags]) == status
        return workplace / name

    return run


@pytest.fixture(scope="module")
def whole(train: Train) -> Path:
    """An undisturbed run of six steps."""
    return train("whole")


def rows(folder: Path, kind: str = "loss") -> list[dict[str, Any]]:
    """metrics.jsonl: the steps, or the evaluations (kind ``eval_avg@4``)."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if kind in (row := json.loads(line))]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: Path, two: Path) -> None:
    """Bit by bit: weights, optimizer, and every figure that is no time."""
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        left, right = (load_file(f / "checkpoints" / "step_00006" / file) for f in (one, two))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name
    figures = [
        [{k: v for k, v in row.items() if "time" not in k} for row in rows(f)] for f in (one, two)
    ]
    assert [row["step"] for row in figures[0]] == [1, 2, 3, 4, 5, 6]
    assert figures[0] == figures[1]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], part: str = "") -> bool:
    return all(torch.equal(one[name], two[name]) for name in one if part in name)
