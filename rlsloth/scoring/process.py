"""One worker process as the scorer sees it: started, called, killed, and replaced."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from rlsloth.errors import UserError
from rlsloth.scoring.protocol import Call, Reply, RewardInfo, Setup, failed
from rlsloth.scoring.replies import (
    BASE_BYTES,
    InvalidReplyError,
    check_ready,
    check_reply,
    most_bytes,
)
from rlsloth.scoring.surroundings import worker_environment
from rlsloth.scoring.tree import end_tree

START_SECONDS = 120.0
"""Wall-clock limit for importing the rewards."""
NO_RESULT = "no result after"
"""Beginning of the detail of a call that hung."""
_LAST_WORDS_SECONDS = 1.0
"""Wait for the supervisor's message after a line that is no JSON."""


class WorkerLostError(Exception):
    """The worker did not reply. ``status`` is its exit status; None: it hangs."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"status {status}")
        self.status = status


class WorkerProcess:
    """A worker that starts in the background and is replaced when it dies.

    Use it from one thread at a time; only ``stop`` may be called from another.
    """

    def __init__(self, setup: Setup, passed: Sequence[str] = ()) -> None:
        """Start; ``passed``: secret environment variables that the rewards see."""
        self._setup = setup
        self._passed = passed
        self._calls = itertools.count(1)
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._pending = bytearray()
        self._searched = 0  # bytes of them without a line end
        self._mark = secrets.token_hex(8)
        self._rewards: list[RewardInfo] | None = None
        with theirs:
            self._process = subprocess.Popen(
                # -P: a math_verify.py in the working directory must not hide the library.
                [sys.executable, "-P", "-m", "rlsloth.scoring.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=worker_environment(self._mark, self._passed),
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
                message = self._receive(START_SECONDS, BASE_BYTES)
                ready = check_ready(message, len(self._setup["rewards"]))
            except (WorkerLostError, InvalidReplyError) as lost:
                self.kill()
                raise UserError(
                    f"importing the rewards ({names}) {_start_failure(lost)}: try `rlsloth rewards "
                    "test` on each of them, or raise --reward.memory-gb"
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
        rows = len(call["completions"])
        call["call"] = next(self._calls)
        try:
            self._send(call)
            message = self._receive(wall_seconds, most_bytes(rows))
            reply = check_reply(message, call["call"], rows, self._setup["reserved_metrics"])
            lost = reply["retire"]
        except WorkerLostError as error:
            reply = _lost_reply(error.status, call["cpu_seconds"], wall_seconds)
            lost = True
        except InvalidReplyError as error:
            reply = failed("invalid reply", f"the worker's reply cannot be read: {error}")
            lost = True
        if lost:
            self.kill()
            if not self._closed:
                self._start()
        return reply

    def stop(self) -> None:
        """Kill the process: a call in progress ends, and there is no further one."""
        self._closed = True
        self._kill_processes()

    def kill(self) -> None:
        """End the worker and all processes that it started, and free its resources."""
        self._kill_processes()
        self._process.wait()
        self._channel.close()

    def _kill_processes(self) -> None:
        # Until wait() reaps the leader the group's number cannot be given to another process.
        if self._process.returncode is None:
            end_tree(self._process.pid, self._mark)  # while the supervisor lives to adopt orphans
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, message: Setup | Call) -> None:
        self._channel.settimeout(START_SECONDS)
        # A dead worker is noticed by _receive, which reads how it ended.
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, seconds: float, limit: int) -> Any:
        """The next message, of at most ``limit`` bytes.

        Raises:
            WorkerLostError: the worker ended, or sent no whole message in time.
            InvalidReplyError: the message is too long, or no JSON.
        """
        deadline = time.monotonic() + seconds
        garbled = False
        while True:
            line = self._next_line()
            if len(self._pending if line is None else line) > limit:
                raise InvalidReplyError(f"it has more than {limit:,} bytes")
            if line:
                message = _decode(line)
                if isinstance(message, dict) and "died" in message:
                    died = message["died"]
                    raise WorkerLostError(died if type(died) is int else -signal.SIGKILL)
                if message is not None:
                    return message
                # The worker's death cut it short, which the supervisor says next; or it is garbage.
                garbled = True
                deadline = min(deadline, time.monotonic() + _LAST_WORDS_SECONDS)
            elif line is None and not self._read(deadline):
                if garbled:
                    raise InvalidReplyError("it is no JSON")
                raise WorkerLostError(None)

    def _next_line(self) -> bytes | None:
        """Take a whole line from the bytes that have come; None if there is none."""
        end = self._pending.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._pending)
            return None
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        self._searched = 0
        return line

    def _read(self, deadline: float) -> bool:
        """Wait for more bytes; False after the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        self._channel.settimeout(left)
        try:
            data = self._channel.recv(1 << 20)
        except TimeoutError:
            return False
        except OSError:
            data = b""
        if not data:  # worker and supervisor are both gone
            raise WorkerLostError(-signal.SIGKILL)
        self._pending += data
        return True


def describe(status: int) -> str:
    """An exit status in words, such as ``SIGSEGV`` or ``exit status 3``."""
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"exit status {status}"


def _start_failure(error: WorkerLostError | InvalidReplyError) -> str:
    if isinstance(error, InvalidReplyError):
        return f"gave a reply that cannot be read ({error})"
    if error.status is None:
        return f"did not finish in {START_SECONDS:g} s"
    return f"ended the process ({describe(error.status)})"


def _decode(line: bytes) -> Any:
    """The message in a line; None for a line that is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _lost_reply(status: int | None, cpu_seconds: float, wall_seconds: float) -> Reply:
    if status is None:
        return failed("timeout", f"{NO_RESULT} {wall_seconds:g} s of wall-clock time")
    if status == -signal.SIGVTALRM:
        detail = f"more than {cpu_seconds:g} s of CPU time in a call that no exception can end"
        return failed("timeout", detail)
    return failed("crashed", f"the reward ended its process ({describe(status)})")


def hung(reply: Reply) -> bool:
    """Whether a call ended at its wall-clock limit."""
    error = reply["error"]
    return error is not None and error["detail"].startswith(NO_RESULT)
