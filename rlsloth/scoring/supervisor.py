"""The supervisor of a worker: a process that runs no foreign code and ends all that the worker
started, once the worker or the scorer is gone."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
from types import FrameType

from rlsloth.scoring.protocol import Died
from rlsloth.scoring.tree import MARK, adopt_orphans, end_tree


def supervise(fd: int) -> None:
    """Fork, and return in the child only; ``fd``: the socket to the scorer."""
    scorer_gone = select.poll()
    scorer_gone.register(fd, 0)  # POLLHUP is always reported, and no data is taken from the child
    adopt_orphans()
    worker = 0

    def child_changed(_signum: int, _frame: FrameType | None) -> None:
        for pid, status in _ended_children():
            if pid == worker:
                # The newline ends a reply that the child's death cut short.
                channel = socket.socket(fileno=fd)
                with contextlib.suppress(OSError):
                    died = Died(died=os.waitstatus_to_exitcode(status))
                    channel.sendall(b"\n" + json.dumps(died).encode() + b"\n")
                _end()

    # Blocked until the child's number is known.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGCHLD, child_changed)
    worker = os.fork()
    if worker == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    scorer_gone.poll()
    _end()


def _ended_children() -> list[tuple[int, int]]:
    """(process id, wait status) of children that have ended; adopted orphans are among them."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(ended)
    return found


def _end() -> None:
    end_tree(os.getpid(), os.environ.get(MARK, ""))
    os.killpg(0, signal.SIGKILL)
