"""Signals stop a run where it is safe; a second one, or the time limit, ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from helpers.run_folders import config, rows
from rlsloth.run import stopping
from rlsloth.run.run import Run
from rlsloth.run.stopping import DEFAULTS, Stopped, Stopper

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def handlers_of_a_terminal() -> Iterator[None]:
    """A script's background job ignores Ctrl-C, and nohup SIGHUP, which the run would respect."""
    before = {number: signal.signal(number, default) for number, default in DEFAULTS.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_at_once_where_nothing_is_held(number: int, status: int) -> None:
    def work() -> None:
        with Stopper().listening():
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(Stopped, match=signal.Signals(number).name) as found:
        work()
    assert found.value.status == status
    assert isinstance(found.value, KeyboardInterrupt)


def test_a_signal_waits_for_work_that_is_held(capfd: pytest.CaptureFixture[str]) -> None:
    stopper, done = Stopper(), []

    def work() -> None:
        with stopper.listening():
            with stopper.finishing(), stopper.finishing():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("update")
            done.append("more")

    with pytest.raises(Stopped):
        work()
    assert done == ["update"]
    assert "SIGTERM: the run stops after this update" in capfd.readouterr().err


def test_closing_a_run_is_not_interrupted() -> None:
    stopper, done = Stopper(), []
    with stopper.listening(), stopper.closing():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("report")
    assert done == ["report"]


def test_handlers_are_given_back_and_those_of_others_are_left() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Stopper().listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {n: signal.getsignal(n) for n in before} == before


def test_another_thread_listens_to_nothing() -> None:
    def listen() -> None:
        with Stopper().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[object] = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


HANGS = """
import os, signal, sys, time
from rlsloth.run import stopping
stopping.LIMIT_SECONDS = float(sys.argv[1])
stopper = stopping.Stopper()
with stopper.listening(), stopper.finishing():
    print("ready", flush=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline: time.sleep(0.05)
"""


@pytest.mark.parametrize("limit", ["0.5", "60"])
def test_a_second_signal_or_the_limit_leaves_at_once(limit: str) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, limit], stdout=pipe, stderr=pipe, text=True
    ) as run:
        assert run.stdout.readline() == "ready\n"
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        if limit == "60":
            run.send_signal(signal.SIGTERM)  # at the same moment: a launcher passes it on
            time.sleep(stopping.REPEAT_SECONDS + 0.5)
            assert run.poll() is None
            run.send_signal(signal.SIGTERM)
        assert run.wait(20) == 143
        assert time.monotonic() - began < 15
        assert "left at once; --run.resume continues" in run.stderr.read()


def test_a_stopped_run_has_its_report_and_names_its_folder(tmp_path):
    def train():
        with Run.start(config(tmp_path / "run")) as run:
            for step in run.steps(1, 3):
                with run.stopper.finishing():
                    if step == 2:
                        os.kill(os.getpid(), signal.SIGTERM)
                    run.log(step, {"reward": 0.5})

    with pytest.raises(Stopped) as found:
        train()
    assert found.value.folder == tmp_path / "run"
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "report.html").exists()
    assert "stopped by Stopped: SIGTERM" in (tmp_path / "run" / "log.txt").read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
