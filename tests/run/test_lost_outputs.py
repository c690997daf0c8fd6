"""Outputs that go away: the console, log.txt, trackers and the report end no run."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.groups import make_group
from helpers.run_folders import config, rows
from rlsloth.cli import main as cli
from rlsloth.errors import UserError, visible
from rlsloth.run.report.page import is_complete
from rlsloth.run.run import Run
from rlsloth.run.samples import write_samples
from rlsloth.run.trackers import TRACKERS

ROOT = Path(__file__).parents[1]
TRAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from helpers.run_folders import config
from rlsloth.cli import main as cli
from rlsloth.run import machine
from rlsloth.run.console import tell
from rlsloth.run.run import Run

machine.device_facts = dict  # it imports torch

def work(argv):
    with Run.start(config(Path(sys.argv[1]))) as run:
        tell("begun")
        input()
        for step in run.steps(1, 3):
            run.say("x" * 20_000)
            run.log(step, {{"reward": 0.5}})
        tell("told")
        run.finish({{}})
    return 0

cli._main = work
sys.exit(cli.main([]))
"""


def train(folder: Path, stdout: Any, stdin: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(folder)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def assert_whole(folder: Path) -> None:
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    assert (folder / "report.html").exists()
    assert (folder / "log.txt").read_text().count("xxx") > 0


@pytest.mark.slow
def test_a_reader_that_leaves_ends_nothing_but_shows_in_the_status(tmp_path):
    run = train(tmp_path / "run", subprocess.PIPE)
    assert run.stdout.readline().startswith("run folder")
    assert run.stdout.readline() == "begun\n"
    run.stdout.close()
    _, errors = run.communicate("\n", timeout=60)
    assert (run.returncode, errors) == (141, "")
    assert_whole(tmp_path / "run")


@pytest.mark.slow
def test_a_closed_terminal_ends_nothing(tmp_path):
    master, slave = pty.openpty()
    run = train(tmp_path / "run", slave)
    os.close(slave)
    while b"begun" not in os.read(master, 4096):
        pass
    os.close(master)
    _, errors = run.communicate("\n", timeout=60)
    assert (run.returncode, errors) == (0, "")
    assert_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_console_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        run = train(tmp_path / "run", full)
        _, errors = run.communicate("\n", timeout=60)
    assert "Traceback" not in errors
    assert_whole(tmp_path / "run")


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    run = Run.start(config(tmp_path / "run"))
    (run.dir / "log.txt").unlink()
    (run.dir / "log.txt").mkdir()
    for step in run.steps(1, 3):
        run.warn("something")
        run.log(step, {"reward": 0.5})
    run.finish({})
    printed = capsys.readouterr().out
    assert printed.count("messages are not logged") == 1
    assert f"{run.dir}/log.txt: Is a directory (writing" in printed
    assert (run.dir / "summary.json").exists()


@pytest.mark.parametrize("file", ["samples", "environment", "config", "metrics"])
def test_a_damaged_file_costs_no_finished_run_its_end(tmp_path, capsys, file):
    run = Run.start(config(tmp_path / "run"))
    group = make_group("a", "b")
    for step in run.steps(1, 3):
        run.log(step, {"reward": 0.5})
        path = run.dir / "samples" / f"step_{step:05d}.parquet"
        write_samples(path, step, [group], [])
    damaged = {
        "samples": run.dir / "samples" / "step_00001.parquet",
        "environment": run.dir / "environment.json",
        "config": run.dir / "config.yaml",
        "metrics": run.dir / "metrics.jsonl",
    }[file]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 4] = b"\xff\x00{["
    damaged.write_bytes(data)
    run.finish({"steps": 3})
    assert json.loads((run.dir / "summary.json").read_text()) == {"steps": 3}
    assert str(damaged) in capsys.readouterr().out
    assert (run.dir / "report.html").exists() == (file != "metrics")


def test_a_run_is_complete_once_its_report_shows_its_summary(tmp_path):
    run = Run.start(config(tmp_path / "run"))
    run.log(1, {"reward": 0.5})
    run.report()  # as after an interruption
    assert not is_complete(run.dir)
    run.finish({"accuracy_after": 0.5, "device": "a <b> & 'c'"})
    assert is_complete(run.dir)
    (run.dir / "summary.json").write_text('{"accuracy_after": 0.75}')  # killed before the report
    assert not is_complete(run.dir)


class Offline:
    """A tracker that cannot start."""

    name = "offline"
    remedy = "plug the cable in"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        raise ConnectionError("No API key configured.\nUse `offline login`")


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "offline", Offline)
    with pytest.raises(UserError, match=r"^--run\.trackers offline: .*No API key.*cable") as found:
        Run.start(config(tmp_path / "run", trackers=["offline"]))
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_control_characters_are_visible(tmp_path, capsys, monkeypatch):
    nasty = "a\x1b[2Jb\x07\x9bc\u202ed\u2028e\ud800"
    assert visible(nasty) == r"a\x1b[2Jb\x07\x9bc\u202ed\u2028e\ud800"
    kept = "tab\t, break\n, naïve, 👨\u200d👩\u200d👧, नमस्ते, \u00a0"
    assert visible(kept) == kept
    run = Run.start(config(tmp_path / "run"))
    run.warn(nasty)
    run.finish({})
    for text in (capsys.readouterr().out, (run.dir / "log.txt").read_text()):
        assert r"a\x1b[2Jb" in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)

    def refuse(*_: Any) -> int:
        raise UserError(f"the server says {nasty}")

    monkeypatch.setattr(cli, "_run", refuse)
    assert cli.main(["grpo"]) == 2
    error = capsys.readouterr().err
    assert r"the server says a\x1b[2Jb" in error
    assert "\x1b" not in error
