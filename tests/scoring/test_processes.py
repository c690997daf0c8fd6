"""Worker processes end with the scorer, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.scoring.scorer import Scorer


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _session_members(session: int) -> list[int]:
    """Live processes of a session; a worker's supervisor leads one of its own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _alive(int(entry.name)):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session:
                found.append(int(entry.name))
    return found


def _wait_until_empty(sessions: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(_session_members(session) for session in sessions):
        assert time.monotonic() < deadline, [_session_members(s) for s in sessions]
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts by /proc")


@needs_proc
def test_close_leaves_nothing_behind(hostile_file: str) -> None:
    scorer = Scorer([f"{hostile_file}:hostile"], RewardConfig(workers=1))
    scorer.score([make_group("forked sleeper", "forked holder")])
    sessions = [worker.pid for worker in scorer._workers]
    assert len(_session_members(sessions[0])) == 4  # supervisor, worker, sleep, forked worker
    scorer.close()
    _wait_until_empty(sessions)


@needs_proc
def test_workers_die_with_a_killed_trainer(hostile_file: str) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from helpers.groups import make_group
        from rlsloth.config import RewardConfig
        from rlsloth.scoring.scorer import Scorer
        scorer = Scorer([{hostile_file + ":busy"!r}], RewardConfig(workers=1, cpu_seconds=1000))
        scorer.score([make_group("warm")])
        print(*(worker.pid for worker in scorer._workers), flush=True)
        scorer.score([make_group("go")])
        """
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    sessions = [int(pid) for pid in trainer.stdout.readline().split()]
    deadline = time.monotonic() + 10
    while len(_session_members(sessions[0])) < 3:  # supervisor, busy worker, its sleep
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    _wait_until_empty(sessions)
