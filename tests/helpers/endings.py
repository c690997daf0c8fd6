"""Equality of two run folders, and small runs of every loop whose end is tested."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from helpers.faults import FaultyRuns, faulty_runs
from helpers.gguf_models import make_folder
from helpers.supervised import PAIRS, SFT, write_rows
from helpers.tiny import save_sampled_model
from helpers.trained_runs import make_run

COMMON: dict[str, Any] = {
    "steps": 4,
    "tokens_per_microbatch": 150,
    "model": {"path": "model", "device": "cpu"},
    "lora": {"rank": 2, "alpha": 4},
    "optim": {"lr": 0.01},
    "run": {"save_every": 2, "keep": 1, "show_samples": 0},
}
REWARD = """
def letters(completions, **_):
    return [float(len(c[0]["content"]) % 3) for c in completions]
"""
EXAMPLES = COMMON | {"samples_per_step": 3, "eval": {"every": 2}}
SAMPLES = {
    "prompts_per_step": 2,
    "group_size": 2,
    "rewards": ["./reward.py:letters"],
    "reward": {"workers": 1},
    "rollout": {"max_tokens": 6},
    "env": {"train": "sft.jsonl", "heldout": 2},
    "eval": {"every": 2, "problems": 2, "samples": 2},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sft": EXAMPLES | {"data": {"train": "sft.jsonl", "heldout": 3}},
    "dpo": EXAMPLES | {"data": {"train": "pairs.jsonl", "heldout": 3}},
    "grpo": COMMON | SAMPLES | {"tokens_per_microbatch": 300},
    "distill": {
        **{key: SAMPLES[key] for key in ("rewards", "reward", "rollout", "env")},
        "model": {"path": "model", "device": "cpu"},
        "traces": {
            "problems": 6, "samples": 2, "chunk": 2, "correct_at": 0, "identical": "problem"
        },
    },
}  # fmt: skip

TRAINED = "trained"
"""Folder of the run that is exported."""
EXPORTS: dict[str, list[str]] = {
    "export_adapter": ["--to", "adapter"],
    "export_merged": ["--to", "merged"],
    "export_gguf": ["--to", "gguf", "--gguf", "f16", "q8_0"],
}


def make_workplace(folder: Path) -> None:
    """Write a model, data, a reward and a configuration of each loop."""
    save_sampled_model(folder / "model")
    write_rows(folder / "sft.jsonl", SFT)
    write_rows(folder / "pairs.jsonl", PAIRS)
    (folder / "reward.py").write_text(REWARD)
    make_run(folder / TRAINED, make_folder(folder / "base", "smollm"))
    for loop, config in CONFIGS.items():
        (folder / f"{loop}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every loop can be started."""
    folder = tmp_path_factory.mktemp("work")
    make_workplace(folder)
    return folder


@pytest.fixture(scope="module")
def runs(endings: Path) -> Iterator[FaultyRuns]:
    """A server that starts commands in that folder."""
    with faulty_runs(endings) as runs:
        yield runs


def command(loop: str, folder: Path) -> list[str]:
    """The command that starts the loop in the folder, or that continues what is there."""
    if loop in EXPORTS:
        return ["export", TRAINED, *EXPORTS[loop], "--out", str(folder / "out")]
    if loop == "distill":
        words = ["distill", "distill.yaml", "--out", str(folder)]
        return [*words, "--resume"] if (folder / "config.yaml").exists() else words
    words = [loop, f"{loop}.yaml", "--run.dir", str(folder)]
    return [*words, "--run.resume"] if (folder / "metrics.jsonl").exists() else words


def is_complete(loop: str, folder: Path) -> bool:
    if loop in EXPORTS:
        return (folder / "out").exists()
    if loop == "distill":
        return (folder / "README.md").exists() and (folder / "teacher/report.html").exists()
    return (folder / "report.html").exists() and (folder / "summary.json").exists()


def contents(folder: Path) -> dict[str, Any]:
    """All that a run left, by path, without times and dates."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name.startswith("environment-"):
            continue
        found[name] = READERS.get(path.suffix, lambda p: None)(path)
    return found


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if "time" not in k and k not in ("seconds", "date")}


def _lines(path: Path) -> list[Any]:
    return [_undated(json.loads(line)) for line in path.read_text().splitlines()]


def _undated(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _undated(v) for k, v in _timeless(value).items()}
    return value


def _tensors(path: Path) -> Any:
    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


def _json(path: Path) -> Any:
    # Environments differ by command; manifests have the checksums of states.
    return None if path.name == "environment.json" else _undated(json.loads(path.read_text()))


READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".safetensors": _tensors,
    ".parquet": lambda path: pq.read_table(path).to_pylist(),
}
