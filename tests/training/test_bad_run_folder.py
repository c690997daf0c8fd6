"""A user's mistakes in the run folder: status 2, and one line that says where and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.refusals import CONFIG
from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow


def test_a_folder_that_was_there_stays(sound_folder: Path, capfd) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    assert cli.main(["grpo", "config.yaml", "--run.dir", "mine", "--model.path", "./modle"]) == 2
    assert Path("mine/notes.txt").read_text() == "keep"
    assert "stopped by UserError" in Path("mine/log.txt").read_text()
    printed = capfd.readouterr()
    assert (printed.out + printed.err).count("modle:") <= 1
    assert "stopped by" not in printed.out


def test_files_in_the_way(refused, sound_folder: Path) -> None:
    Path("file").write_text("")
    refused("grpo --run.dir file", "--run.dir file is a file", new=False)
    refused("grpo --run.dir file/in", "file/in: Not a directory", new=False)
    refused(f"grpo --run.dir {'n' * 300}", "File name too long", new=False)


def test_damaged_files_of_a_run(refused, sound_folder: Path) -> None:
    assert cli.main(["grpo", "config.yaml", "--run.dir", "hurt"]) == 0
    saved = Path("hurt/config.yaml").read_bytes()
    command = "grpo --run.dir hurt --run.resume --steps 2"
    for damage in (b"", b"steps: [", b"\xff", b"steps: 0"):
        Path("hurt/config.yaml").write_bytes(damage)
        refused(command, "hurt/config.yaml cannot be read", new=False)
        assert Path("hurt/config.yaml").read_bytes() == damage
    Path("hurt/config.yaml").write_bytes(saved)
    metrics = Path("hurt/metrics.jsonl").read_bytes()
    for damage in (b"{", b"3", b'{"reward": 1}', b"\xff"):
        Path("hurt/metrics.jsonl").write_bytes(metrics + damage + b"\n" + metrics)
        refused(command, "hurt/metrics.jsonl line 2 is damaged", new=False)
    Path("hurt/metrics.jsonl").write_bytes(metrics)
    Path("hurt/samples/step_x.parquet").write_text("stray")
    Path("hurt/samples/step_00001.parquet").write_text("damaged")
    assert cli.main(["grpo", "config.yaml", *command.split()[1:]]) == 0


def test_folder_with_a_run(refused, sound_folder: Path) -> None:
    assert cli.main(["grpo", "config.yaml", "--run.dir", "done"]) == 0
    before = Path("done/metrics.jsonl").read_bytes()
    refused(
        "grpo --run.dir done", "done already holds a run", "--run.resume", "--run.dir", new=False
    )
    assert Path("done/metrics.jsonl").read_bytes() == before


def test_folder_in_use(refused, sound_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlsloth.config import *\n"
        "from rlsloth.run.folder import open_folder\n"
        "folder, lock = open_folder(RunConfig(dir=Path('busy')), ModelConfig(), Path('runs'))\n"
        "print(flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        holder.stdout.readline()
        refused(
            "grpo --run.dir busy",
            f"busy is in use by process {holder.pid}",
            "pass another --run.dir",
            new=False,
        )
        holder.stdin.close()
    assert cli.main(["grpo", "config.yaml", "--run.dir", "busy"]) == 0


def test_nothing_to_resume(refused) -> None:
    refused("grpo --run.dir never --run.resume", "no run in never to resume", new=False)
    refused("grpo --run.resume", "--run.resume needs --run.dir", new=False)


def test_eval_of_an_unfinished_run(refused, sound_folder: Path) -> None:
    Path("half").mkdir()
    Path("half/config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": {"adapter": None}}))
    refused("eval --run.dir half", "half has no adapter yet", "--model.adapter", new=False)


def test_eval_of_a_run_that_is_not_there(refused, sound_folder: Path) -> None:
    """The base model alone would be evaluated, under the name of what was trained."""
    Path("runs/letters").mkdir(parents=True)
    Path("runs/letters/config.yaml").write_text(yaml.safe_dump(CONFIG))
    words = ("no run to evaluate", "--model.adapter")
    refused("eval --run.dir runs/leters", "--run.dir runs/leters", "'letters'", *words, new=False)
    refused("eval --run.dir runs", "--run.dir runs:", *words, new=False)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["letters"]


def test_eval_of_a_run_that_was_moved(sound_folder: Path, capfd) -> None:
    assert cli.main(["grpo", "config.yaml", "--run.dir", "first"]) == 0
    Path("first").rename("moved")
    command = ["eval", "moved/config.yaml", "--eval.problems", "1", "--eval.samples", "2"]
    assert cli.main(command) == 0
    assert "continuing moved/adapter" in capfd.readouterr().out
