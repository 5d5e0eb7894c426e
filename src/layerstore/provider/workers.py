"""A bounded pool of daemon threads: work that may wait, kept away from the loop."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)


class WorkerPool:
    """``workers`` threads over a queue of at most ``capacity`` calls.

    The threads are daemons: one that hangs on a dead registry never keeps the
    process from ending.
    """

    def __init__(self, name: str, workers: int, capacity: int) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], None]) -> bool:
        """Queue a call; False, at once, when the queue is full."""
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            return False
        return True

    def close(self, seconds: float = 1.0) -> None:
        """Drop what is queued and wait a bounded time for the threads to end."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception:
                _log.exception("worker call failed")
