"""A folder in which everything is right, and commands in it that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli

REWARD = """
def ones(completions, **_): return [float(i) for i, _ in enumerate(completions)]
def long(completions, **_): return [1.0] * (len(completions) + 1)
def raises(completions, **_): raise ValueError("no digits here")
def wants_gold(completions, gold, **_): return [0.0] * len(completions)
"""
CONFIG = {
    "steps": 1,
    "prompts_per_step": 2,
    "group_size": 2,
    "rewards": ["./reward.py:ones"],
    "model": {"path": "model", "device": "cpu"},
    "lora": {"rank": 2},
    "env": {"train": "data.jsonl", "heldout": 2},
    "rollout": {"max_tokens": 4},
    "reward": {"workers": 1},
    "eval": {"at_start": False, "at_end": False},
    "run": {"save_every": 0, "show_samples": 0},
}


def write_rows(path: str, *rows: dict[str, Any]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which everything is right; it is the working directory."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_llama(context=128).save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_rows("data.jsonl", *({"question": f"Question {i}?"} for i in range(8)))
        Path("reward.py").write_text(REWARD)
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
        yield folder


@pytest.fixture
def refused(sound_folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs the command; it must leave with 2 and one line on stderr that holds all the words."""

    def check(command: str, *words: str, new: bool = True) -> None:
        args = command.split()
        if new:
            args += ["--run.dir", "refused"]
        capfd.readouterr()
        assert cli.main([args[0], "config.yaml", *args[1:]]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ")
        for word in words:
            assert word in line
        assert not Path("refused").exists()  # made by the start that failed

    return check


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, for libraries that have read it already."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
