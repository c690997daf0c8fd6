"""Blocking calls in parallel, abandoned as soon as one of them fails."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield the position and result of every job as it is done; raise the first exception.

    The threads are daemons: after an exception or Ctrl-C, nothing waits for a thread that is still
    in a call, and no thread begins another job.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Result] | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()
    for position in range(len(jobs)):
        waiting.put(position)

    def work() -> None:
        while not stopped.is_set():
            try:
                position = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((position, function(jobs[position])))
            except BaseException as error:
                stopped.set()
                done.put(error)

    for _ in range(min(workers, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in jobs:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stopped.set()
