"""A bounded pool of daemon threads: work that may wait, kept away from the loop."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
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

    def close(self) -> None:
        """Drop what is queued and let the threads end; busy ones do when their call does."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception:
                _log.exception("worker call failed")
