"""A limit of CPU time for one answer, inside the limit that a scoring worker sets for its call."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class OutOfTimeError(BaseException):
    """The time for one answer is spent. Not an Exception: sympy catches those broadly."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block once it has used that much CPU time.

    CPU time, since a busy machine must not change a verdict. A timer that is already set, as a
    worker's, goes on afterwards. Outside of the main thread, where Python allows no signals, there
    is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def exceeded(_signum: int, _frame: FrameType | None) -> None:
        raise OutOfTimeError

    start = time.process_time()
    handler = signal.signal(signal.SIGPROF, exceeded)
    before, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
    if 0 < before <= seconds:  # the call's own limit comes first
        signal.signal(signal.SIGPROF, handler)
        signal.setitimer(signal.ITIMER_PROF, before)
        yield
        return
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler if handler is not None else signal.SIG_DFL)
        if before:
            used = time.process_time() - start
            signal.setitimer(signal.ITIMER_PROF, max(before - used, 1e-3))
