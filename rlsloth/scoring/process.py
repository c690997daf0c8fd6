"""One worker process as the scorer sees it: started, called, killed, and replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any, cast

from rlsloth.errors import UserError
from rlsloth.scoring.protocol import Call, Ready, Reply, RewardInfo, Setup, failed

START_SECONDS = 120.0
"""Wall-clock limit for importing the rewards."""


class WorkerLostError(Exception):
    """The worker did not reply. ``status`` is its exit status; None: it hangs."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"status {status}")
        self.status = status


class WorkerProcess:
    """A worker that starts in the background and is replaced when it dies.

    Use it from one thread at a time; only ``stop`` may be called from another.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._pending = b""
        self._rewards: list[RewardInfo] | None = None
        with theirs:
            self._process = subprocess.Popen(
                # -P: a math_verify.py in the working directory must not hide the library.
                [sys.executable, "-P", "-m", "rlsloth.scoring.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        self._send(self._setup)

    @property
    def pid(self) -> int:
        """The supervisor's process id, which is also that of the worker's session and group."""
        return self._process.pid

    def rewards(self) -> list[RewardInfo]:
        """Return the signatures of the rewards, once the worker has imported them.

        Raises:
            UserError: a reward cannot be found or imported, or has no parameter of a configured
                name.
        """
        if self._rewards is None:
            names = ", ".join(reward["name"] for reward in self._setup["rewards"])
            try:
                ready = cast(Ready, self._receive(START_SECONDS))
            except WorkerLostError as lost:
                self.kill()
                reason = (
                    f"did not finish in {START_SECONDS:g} s"
                    if lost.status is None
                    else f"ended the process ({describe(lost.status)})"
                )
                raise UserError(
                    f"importing the rewards ({names}) {reason}: try `rlsloth rewards test` on each "
                    "of them, or raise --reward.memory-gb"
                ) from None
            if ready["error"] is not None:
                raise UserError(ready["error"])
            self._rewards = ready["rewards"]
        return self._rewards

    def call(self, call: Call, wall_seconds: float) -> Reply:
        """Make one call, whatever happens to the worker; a lost worker is replaced."""
        if self._closed:
            raise RuntimeError("the scorer is closed")
        self.rewards()
        try:
            self._send(call)
            reply = cast(Reply, self._receive(wall_seconds))
            lost = reply["retire"]
        except WorkerLostError as error:
            reply = _lost_reply(error.status, call["cpu_seconds"], wall_seconds)
            lost = True
        if lost:
            self.kill()
            if not self._closed:
                self._start()
        return reply

    def stop(self) -> None:
        """Kill the process: a call in progress ends, and there is no further one."""
        self._closed = True
        self._kill_group()

    def kill(self) -> None:
        """End the worker and all processes that it started, and free its resources."""
        self._kill_group()
        self._process.wait()
        self._channel.close()

    def _kill_group(self) -> None:
        # Until wait() reaps the leader the group's number cannot be given to another process.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, message: Setup | Call) -> None:
        self._channel.settimeout(START_SECONDS)
        # A dead worker is noticed by _receive, which reads how it ended.
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            line, newline, rest = self._pending.partition(b"\n")
            if newline:
                self._pending = rest
                message = _decode(line)
                if message is None:
                    continue
                if "died" in message:
                    raise WorkerLostError(message["died"])
                return message
            self._channel.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                data = self._channel.recv(1 << 20)
            except TimeoutError:
                raise WorkerLostError(None) from None
            except OSError:
                data = b""
            if not data:  # worker and supervisor are both gone
                raise WorkerLostError(-signal.SIGKILL)
            self._pending += data


def describe(status: int) -> str:
    """An exit status in words, such as ``SIGSEGV`` or ``exit status 3``."""
    if status < 0:
        return signal.Signals(-status).name
    return f"exit status {status}"


def _decode(line: bytes) -> Any:
    """The message in a line; None for a line that the worker's death cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _lost_reply(status: int | None, cpu_seconds: float, wall_seconds: float) -> Reply:
    if status is None:
        return failed("timeout", f"no result after {wall_seconds:g} s of wall-clock time")
    if status == -signal.SIGVTALRM:
        detail = f"more than {cpu_seconds:g} s of CPU time in a call that no exception can end"
        return failed("timeout", detail)
    return failed("crashed", f"the reward ended its process ({describe(status)})")


def _environment() -> dict[str, str]:
    # The trainer's import path, then the working directory, where users keep their rewards.
    path = [*(entry for entry in sys.path if entry), os.getcwd()]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONHASHSEED": "0",  # set order decides some of sympy's simplifications
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
