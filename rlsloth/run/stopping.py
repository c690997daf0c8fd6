"""Signals that stop a run: SIGTERM, SIGHUP and Ctrl-C.

The first one ends the run at a safe point: at once while it samples, scores, evaluates or loads,
and after the update, log or checkpoint that is being made. The run then saves a checkpoint and
writes its report. A second signal, or `LIMIT_SECONDS` without an end, leaves at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

LIMIT_SECONDS = 60.0
"""Longest time from the signal to the end of the process."""
REPEAT_SECONDS = 1.0
"""Signals within this time after the first count as the same: terminals, shells and launchers each
pass one on."""
DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
"""Signals that stop a run, with the handlers that a program starts with."""


class Stopped(KeyboardInterrupt):
    """A signal stops the run."""

    folder: Path | None = None
    """The run folder, once the run has closed it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number
        """Exit status by the shell's convention: 130, 143 or 129."""


class Stopper:
    """Turns signals into `Stopped` where a run can be stopped."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._since = 0.0
        self._busy = 0
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in the body.

        A signal that is ignored (nohup) or has a handler of the program's own keeps it. Only the
        main thread can listen.
        """
        taken = []
        if threading.current_thread() is threading.main_thread():
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) == default:
                    signal.signal(number, self._handle)
                    taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, DEFAULTS[number])
            if self._timer is not None:
                self._timer.cancel()

    def hold(self) -> None:
        """Begin work that no signal interrupts; `release` as often."""
        self._busy += 1

    def release(self) -> None:
        """End such work; raise Stopped if a signal has come in the meantime."""
        self._busy -= 1
        if self._number is not None and not self._busy:
            raise Stopped(self._number)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Finish the body before a signal stops the run."""
        self.hold()
        try:
            yield
        except BaseException:
            self._busy -= 1
            raise
        self.release()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Run the body, which ends a run, without raising Stopped for a signal."""
        self.hold()
        try:
            yield
        finally:
            self._busy -= 1

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._number is not None:
            if time.monotonic() - self._since > REPEAT_SECONDS:
                self._leave(number)
            return
        self._number, self._since = number, time.monotonic()
        self._timer = threading.Timer(LIMIT_SECONDS, self._leave, [number])
        self._timer.daemon = True
        self._timer.start()
        if not self._busy:
            raise Stopped(number)
        _write(
            f"{signal.Signals(number).name}: the run stops after this update (at most "
            f"{LIMIT_SECONDS:g} s); once more to leave at once"
        )

    def _leave(self, number: int) -> None:
        if os.isatty(1):
            with contextlib.suppress(OSError):
                os.write(1, b"\x1b[?25h")  # the progress bar hides the cursor
        _write("left at once; --run.resume continues from the last checkpoint")
        os._exit(128 + number)


def _write(text: str) -> None:
    """Print a line from a signal's handler, where Python's own files may be in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
