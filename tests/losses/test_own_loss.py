"""Whole runs with a loss from a file: a built-in loss written as one changes no bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow

REWARD = """
def letters(completion_ids, **_):
    return [sum(67 <= t < 93 for t in ids) / len(ids) for ids in completion_ids]
"""
DAPO = """
import torch

def dapo(tokens, cfg):
    clipped = tokens.ratio.clamp(1 - cfg.epsilon_low, 1 + cfg.epsilon_low)
    return -torch.minimum(tokens.ratio * tokens.advantages, clipped * tokens.advantages)

def late(tokens, cfg):
    if (tokens.ratio != 1).any() and tokens.logprobs.numel() != 6:
        return tokens.ratio / 0
    return tokens.ratio
"""
CONFIG = {
    "steps": 3,
    "prompts_per_step": 4,
    "group_size": 4,
    "updates_per_rollout": 2,
    "tokens_per_microbatch": 200,
    "rewards": ["./reward.py:letters"],
    "model": {"path": "model", "device": "cpu"},
    "lora": {"rank": 4},
    "env": {"train": "data.jsonl", "heldout": 6},
    "rollout": {"max_tokens": 16, "engine": "transformers"},
    "reward": {"workers": 1},
    "optim": {"lr": 0.01},
    "eval": {"at_start": False, "at_end": False},
    "run": {"show_samples": 0},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data, a reward and losses; it is the working directory."""
    folder = tmp_path_factory.mktemp("work")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"question": f"Question {i}?", "answer": str(i)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "mine.py").write_text(DAPO)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    torch.set_num_threads(threads)


def train(name: str, loss: str) -> int:
    return cli.main(["grpo", "config.yaml", "--run.dir", name, "--loss.name", loss])


def figures(folder: Path) -> list[dict[str, Any]]:
    """Every figure of every step but times and clip shares, which a bare function cannot count."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if "time" not in k and "clip_ratio/" not in k}
            for row in rows]  # fmt: skip


def test_a_built_in_loss_as_a_plugin_is_bit_equal(workplace: Path) -> None:
    for name, loss in (("built_in", "dapo"), ("plugin", "./mine.py:dapo")):
        assert train(name, loss) == 0
    built_in, plugin = workplace / "built_in", workplace / "plugin"
    assert figures(built_in) == figures(plugin)
    assert figures(plugin)[-1]["importance_ratio/mean"] != 1
    one, two = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (built_in, plugin))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert yaml.safe_load((plugin / "config.yaml").read_text())["loss"]["name"] == "./mine.py:dapo"


def test_nan_in_the_middle_of_a_run_ends_it_in_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("late", "./mine.py:late") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "loss.name './mine.py:late'" in line
    assert "losses are not finite" in line
