"""Limits of CPU time for single answers, inside the limit that a worker sets for its call."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType


class OutOfTimeError(BaseException):
    """The time for one answer is spent. Not an Exception: sympy catches those broadly."""


class AnswerLimits:
    """Raise OutOfTimeError in a block once it has used too much CPU time.

    CPU time, since a busy machine must not change a verdict. A timer that is already set, as a
    worker's, keeps its time: it ends a block that outlives it, and goes on afterwards. Outside of
    the main thread, where Python allows no signals, there is no limit.
    """

    def __enter__(self) -> AnswerLimits:
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._handler = signal.signal(signal.SIGPROF, self._exceeded)
            self._outer, _ = signal.setitimer(signal.ITIMER_PROF, 0)
            self._start = time.process_time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._active:
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL if self._handler is None else self._handler)
        if self._outer:
            signal.setitimer(signal.ITIMER_PROF, max(self._left(), 1e-4))

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Limit a block to that much CPU time."""
        if not self._active:
            yield
            return
        left = max(self._left(), 1e-4) if self._outer else float("inf")
        # Decided now: when the timer fires, its clock and process_time may differ by some ms.
        self._outer_binds = left <= seconds
        signal.setitimer(signal.ITIMER_PROF, min(seconds, left))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _left(self) -> float:
        """CPU seconds that the timer that was set before still has."""
        return self._outer - (time.process_time() - self._start)

    def _exceeded(self, signum: int, frame: FrameType | None) -> None:
        if self._outer_binds and callable(self._handler):
            self._handler(signum, frame)
        raise OutOfTimeError
