"""A resume compares the contents of its inputs, and names what has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.endings import command, make_workplace
from helpers.faults import FaultyRuns, faulty_runs
from rlsloth.errors import UserError
from rlsloth.training.progress import refuse_changes

pytestmark = pytest.mark.slow
ENVIRONMENT = """
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from rlsloth.environments.protocol import SingleTurn
from rlsloth.records import Prompt

def words(cfg, seed):
    rows = [json.loads(line) for line in Path(cfg.train).read_text().splitlines()]
    prompts = [
        Prompt(i, ({"role": "user", "content": row["question"]},), {"answer": row["answer"]})
        for i, row in enumerate(rows)
    ]
    return SingleTurn("words", prompts[2:], prompts[:2], source=str(cfg.train))
"""
OPTIONS = ("--env.name", "./env.py:words", "--eval.every", "0", "--run.save-every", "1")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_workplace(folder)
    (folder / "env.py").write_text(ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def runs(workplace: Path) -> Iterator[FaultyRuns]:
    with faulty_runs(workplace) as runs:
        yield runs


@pytest.fixture(scope="module")
def begun(workplace: Path, runs: FaultyRuns) -> Path:
    """A run of one step."""
    folder = workplace / "begun"
    found = runs.run([*command("grpo", folder), *OPTIONS, "--steps", "1"], folder)
    assert found.status == 0, found.printed
    return folder


def _lines(path: Path, at: int, row: dict[str, str]) -> None:
    lines = path.read_text().splitlines()
    lines[at] = json.dumps(json.loads(lines[at]) | row)
    path.write_text("\n".join(lines))


def _append(path: Path) -> None:
    path.write_text(f"{path.read_text()}# mended\n")


def _weights(folder: Path) -> None:
    tensors = load_file(folder / "model/model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + torch.ones_like(tensors[name])
    save_file(tensors, folder / "model/model.safetensors", {"format": "pt"})


CHANGES: dict[str, Callable[[Path], object]] = {
    "the prompts have changed": lambda f: _lines(f / "sft.jsonl", -1, {"question": "say what"}),
    "prompts have changed": lambda f: _lines(f / "sft.jsonl", -1, {"answer": "none"}),
    "held-out prompts": lambda f: _lines(f / "sft.jsonl", 0, {"question": "say nothing"}),
    "reward ./reward.py:letters": lambda f: _append(f / "reward.py"),
    "environment ./env.py:words": lambda f: _append(f / "env.py"),
    "base model": _weights,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_by_name(
    begun: Path, workplace: Path, runs: FaultyRuns, tmp_path: Path, name: str
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(workplace, kept)
    try:
        CHANGES[name](workplace)
        before = (begun / "config.yaml").read_bytes(), (begun / "metrics.jsonl").read_bytes()
        found = runs.run([*command("grpo", begun), *OPTIONS, "--steps", "2"], begun)
        assert found.status == 2, found.printed
        error = found.printed.splitlines()[-1]
        assert error.startswith("error: cannot resume")
        assert name in error
        after = (begun / "config.yaml").read_bytes(), (begun / "metrics.jsonl").read_bytes()
        assert after == before
    finally:
        for file in ("sft.jsonl", "reward.py", "env.py", "model/model.safetensors"):
            shutil.copy(kept / file, workplace / file)


def test_a_run_of_an_earlier_version_says_that_nothing_is_compared(
    begun: Path, runs: FaultyRuns, workplace: Path
) -> None:
    from rlsloth.run import checkpoint

    folder = workplace / "old"
    shutil.copytree(begun, folder)
    found = checkpoint.load_latest(folder / "checkpoints")
    assert found is not None
    state = {k: v for k, v in found.state.items() if k not in ("contents", "evaluation_missing")}
    state["prompts"]["digest"] = ""
    checkpoint.save(folder / "checkpoints", found.step, found.tensors, state, 1)
    resumed = runs.run([*command("grpo", folder), *OPTIONS, "--steps", "2"], folder)
    assert resumed.status == 0, resumed.printed
    assert "earlier version, which kept no digests" in resumed.printed


def test_an_undisturbed_input_resumes(begun: Path, runs: FaultyRuns, workplace: Path) -> None:
    folder = workplace / "again"
    shutil.copytree(begun, folder)
    # What a failed save or a kill leaves is repaired first.
    (folder / "checkpoints" / "latest").write_text("step_00009\n")
    (folder / "checkpoints" / ".partial-step_00007").mkdir()
    (folder / ".environment-20260101-000000.json.tmp").write_text("")
    resumed = runs.run([*command("grpo", folder), *OPTIONS, "--steps", "1"], folder)
    assert resumed.status == 2  # it has finished
    resumed = runs.run([*command("grpo", folder), *OPTIONS, "--steps", "2"], folder)
    assert resumed.status == 0, resumed.printed
    assert (folder / "checkpoints" / "latest").read_text() == "step_00002\n"
    assert [p.name for p in folder.rglob(".*")] == [".lock"]


def test_the_cache_may_be_switched_off_in_a_resume(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(dir=tmp_path, changes={"data.cache": (True, False)})
    refuse_changes(run, "data.")
    run.changes["data.limit"] = (None, 3)
    with pytest.raises(UserError, match=r"data\.limit is now 3"):
        refuse_changes(run, "data.")
