"""Runs of the command that are killed, or whose write fails, at a chosen point.

A point is a call that changes the file system under a folder: a file opened for writing, a rename,
a new or removed file or folder, a sync. A server process imports the libraries once and forks for
each run.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Outcome:
    """A run that has ended."""

    status: int
    """Exit status; negative: the signal that killed it."""
    points: int
    """Points that it came to; 0 if it was killed."""
    printed: str
    """stdout and stderr."""


class FaultyRuns:
    """The server, in a working directory."""

    def __init__(self, folder: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            # The package that the tests import, wherever the working directory is.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def run(
        self,
        argv: list[str],
        folder: Path,
        fault: str = "",
        at: int = 0,
        call: tuple[str, str, int] | None = None,
    ) -> Outcome:
        """Run ``rlsloth ARGV``.

        Args:
            argv: the words of the command.
            folder: the folder whose points count.
            fault: ``kill`` or ``fail`` at point ``at`` in the folder, or ``moment``: killed after
                ``at`` microseconds (by an alarm that nobody handles).
            at: number of a point, of microseconds, or of a call.
            call: (module, name, signal): send it to the process in call ``at`` of that function.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"argv": argv, "folder": str(folder), "fault": fault, "at": at, "call": call}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        for pipe in (self._server.stdin, self._server.stdout):
            assert pipe is not None
            pipe.close()
        self._server.wait(30)


@contextlib.contextmanager
def faulty_runs(folder: Path) -> Iterator[FaultyRuns]:
    runs = FaultyRuns(folder)
    try:
        yield runs
    finally:
        runs.close()


# --- in the server -------------------------------------------------------------------------------


class _Faults:
    """Counts points, and strikes at one of them."""

    def __init__(self, folder: str, fault: str, at: int) -> None:
        self.count = 0
        self._folder, self._fault, self._at = folder, fault, at

    def install(self) -> None:
        sys.addaudithook(self._audit)
        sync = os.fsync

        def fsync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if path.startswith(self._folder):
                self._point(None)
            sync(descriptor)

        os.fsync = fsync  # type: ignore[assignment]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        if event == "open" and not (arguments[2] or 0) & _WRITES:
            return
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            whole = os.path.abspath(os.fsdecode(path))
            if whole.startswith(self._folder) and not whole.endswith(".lock"):
                self._point(whole)

    def _point(self, path: str | None) -> None:
        self.count += 1
        if self.count == self._at and self._fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count == self._at and self._fault == "fail":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([path] if path else []))


def _send_in_call(module: str, name: str, number: int, *, at: int) -> None:
    """Send this process a signal as a function is called for the ``at``-th time."""
    *path, last = name.split(".")
    place = functools.reduce(getattr, path, importlib.import_module(module))
    original, calls = getattr(place, last), itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(place, last, called)


def _child(job: dict[str, Any], result: int) -> None:
    """Run the command in a forked process; write its points to ``result``."""
    faults = _Faults(job["folder"], job["fault"], job["at"])
    faults.install()
    if job["fault"] == "moment":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, job["at"] / 1e6)
    if job["call"]:
        _send_in_call(*job["call"], at=job["at"])
    from rlsloth.cli import main as cli

    status = 70
    try:
        status = cli.main(job["argv"])
    finally:
        os.write(result, str(faults.count).encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import pyarrow.parquet
    import torch
    import transformers
    from peft import get_peft_model  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import rlsloth.distillation.pipeline
    import rlsloth.training.grpo
    import rlsloth.training.preference
    import rlsloth.training.sft  # noqa: F401
    from rlsloth.run.stopping import DEFAULTS

    assert pyarrow.parquet
    assert transformers
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a run ends in a collection, which would go through every imported module
    answers = os.fdopen(os.dup(1), "w")
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        read, write = os.pipe()
        printed = Path(f"printed_{number}.txt").absolute()
        child = os.fork()
        if child == 0:
            file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            # A script's background job ignores some signals, which the run would respect.
            for number, default in DEFAULTS.items():
                signal.signal(number, default)
            _child(job, write)
        os.close(write)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        points = int(os.read(read, 100) or 0)
        os.close(read)
        text = printed.read_text(errors="replace")
        printed.unlink()
        answers.write(json.dumps({"status": status, "points": points, "printed": text}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
