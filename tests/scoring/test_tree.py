"""No process of a reward outlives its worker, and none sees a key."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.scoring.scorer import Scorer
from rlsloth.scoring.surroundings import is_secret

pytestmark = pytest.mark.slow

REWARD = """
import os, subprocess, sys, time

def started(completions, **_):
    sleep = ["sleep", completions[0]]
    subprocess.Popen(sleep, start_new_session=True)
    subprocess.Popen(["setsid", "--fork", *sleep])  # its parent ends at once
    subprocess.Popen(["env", "-i", "/usr/bin/setsid", "/usr/bin/env", *sleep])
    if os.fork() == 0:  # a daemon, as the books have it
        os.setsid()
        if os.fork() == 0: os.execvp("sleep", sleep)
        os._exit(0)
    time.sleep(0.5)
    return [1.0]

def kills_supervisor(completions, **_):
    subprocess.Popen(["sleep", completions[0]], start_new_session=True)
    os.kill(os.getppid(), 9)
    time.sleep(1e9)

def keys(completions, log_extra, **_):
    log_extra("seen", [sorted(n for n in os.environ if n.startswith("X_"))])
    return [1.0]
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts by /proc")


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    (tmp_path / "r.py").write_text(REWARD)
    return str(tmp_path / "r.py")


def sleepers(seconds: str) -> list[int]:
    """Processes ``sleep SECONDS``, which each test gives a number of its own."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", seconds.encode()]:
            found.append(int(entry.name))
    return found


def wait_until_gone(seconds: str) -> None:
    deadline = time.monotonic() + 10
    while found := sleepers(seconds):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@needs_proc
def test_sessions_of_their_own_end_with_the_scorer(rewards: str) -> None:
    seconds = "31623.1"
    with Scorer([f"{rewards}:started"], RewardConfig(workers=1)) as scorer:
        scorer.score([make_group(seconds)])
        assert len(sleepers(seconds)) == 4
    wait_until_gone(seconds)


@needs_proc
def test_they_end_although_the_reward_killed_the_supervisor(rewards: str) -> None:
    seconds = "31623.2"
    cfg = RewardConfig(workers=1, wall_seconds=1)
    with Scorer([f"{rewards}:kills_supervisor"], cfg) as scorer:
        scorer.score([make_group(seconds)])
    wait_until_gone(seconds)


@needs_proc
def test_they_end_with_a_trainer_that_is_killed(rewards: str) -> None:
    seconds = "31623.3"
    code = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from helpers.groups import make_group\n"
        "from rlsloth.config import RewardConfig\n"
        "from rlsloth.scoring.scorer import Scorer\n"
        f"scorer = Scorer([{rewards + ':started'!r}], RewardConfig(workers=1))\n"
        f"scorer.score([make_group({seconds!r})]); print('ready', flush=True); time.sleep(99)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    assert len(sleepers(seconds)) == 4
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    wait_until_gone(seconds)


SECRET = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD",
          "GITHUB_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "apikey", "SSH_AUTH_SOCK",
          "MYSQL_PWD_PASSWORD", "KAGGLE_KEY", "DB_PASSPHRASE", "CLIENT_SECRETS")  # fmt: skip
PLAIN = ("PATH", "HOME", "TOKENIZERS_PARALLELISM", "KEYBOARD", "LANG", "HF_HOME",
         "CUDA_VISIBLE_DEVICES", "HTTP_PROXY", "SSL_CERT_FILE")  # fmt: skip


def test_names_of_secrets() -> None:
    assert [name for name in SECRET if not is_secret(name)] == []
    assert [name for name in PLAIN if is_secret(name)] == []


def test_workers_see_no_keys_but_those_that_are_passed(
    rewards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("X_API_KEY", "X_TOKEN", "X_JUDGE_KEY", "X_PLAIN"):
        monkeypatch.setenv(name, "canary")
    group = make_group("a")
    cfg = RewardConfig(workers=1, pass_env=["X_JUDGE_KEY"])
    with Scorer([f"{rewards}:keys"], cfg) as scorer:
        scorer.score([group])
    assert group.rollouts[0].extras["seen"] == ["X_JUDGE_KEY", "X_PLAIN"]
