"""One scheduler for everything that is fetched: on demand, prefetch, background.

Work comes in *jobs* of three priorities.  A worker takes the most urgent job
that its class may run now; prefetch and background jobs have only a few of the
workers, so that a read on demand never waits for a free one behind them, and
background work rests while somebody waits for bytes.  Where a dead registry holds
all workers, others come to their relief, so that reads from living ones go on.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from layerstore import limits

_log = logging.getLogger(__name__)

Job = Callable[[], object]


class Priority(enum.IntEnum):
    """Smaller is more urgent."""

    DEMAND = 0
    PREFETCH = 1
    BACKGROUND = 2


class Scheduler:
    """Worker threads over three queues.  Thread-safe."""

    def __init__(
        self,
        workers: int = limits.FETCH_WORKERS,
        *,
        prefetch: int = limits.FETCH_PREFETCH_WORKERS,
        background: int = limits.FETCH_BACKGROUND_WORKERS,
        quiet_seconds: float = limits.BACKGROUND_QUIET_SECONDS,
    ) -> None:
        self._queues: tuple[deque[Job], ...] = (deque(), deque(), deque())
        self._allowed = [workers, prefetch, background]
        self._active = [0, 0, 0]
        self._condition = threading.Condition()
        self._closed = False
        self._quiet_seconds = quiet_seconds
        self._last_demand = 0.0
        self._last_begun = 0.0
        self._relief = 0
        self._watched = False
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, priority: Priority, job: Job) -> None:
        """Queue a job.  A closed scheduler drops it."""
        with self._condition:
            if self._closed:
                return
            self._queues[priority].append(job)
            if priority is Priority.DEMAND:
                self._last_demand = time.monotonic()
                self._watch()
            self._condition.notify()

    def _watch(self) -> None:
        """Look again in a while whether reads on demand are still being begun."""
        if self._watched or self._closed or not self._queues[Priority.DEMAND]:
            return
        if sum(self._active) - self._relief < len(self._threads):
            return  # a free worker takes it
        self._watched = True
        timer = threading.Timer(limits.FETCH_RELIEF_SECONDS, self._relieve)
        timer.daemon = True
        timer.start()

    def _relieve(self) -> None:
        with self._condition:
            self._watched = False
            if time.monotonic() - self._last_begun >= limits.FETCH_RELIEF_SECONDS:
                waiting = 0 if self._closed else len(self._queues[Priority.DEMAND])
                free = limits.FETCH_RELIEF_WORKERS - self._relief
                for _ in range(min(waiting, free, len(self._threads))):
                    self._relief += 1
                    self._allowed[Priority.DEMAND] += 1
                    threading.Thread(
                        target=self._work_in_relief, name="relief", daemon=True
                    ).start()
            self._watch()

    def _work_in_relief(self) -> None:
        """One job on demand after another; ends when none waits."""
        while True:
            with self._condition:
                queue = self._queues[Priority.DEMAND]
                if not queue or self._closed:
                    self._relief -= 1
                    self._allowed[Priority.DEMAND] -= 1
                    return
                job = self._begin(Priority.DEMAND)
            self._run(Priority.DEMAND, job)

    def expect_demand(self) -> None:
        """A client is about to read: background work rests for a while."""
        self._last_demand = time.monotonic()

    def give_way(self, priority: Priority, urgent: Callable[[], bool] = lambda: False) -> bool:
        """Called between pieces of work: wait while more urgent work goes on.

        Only background work waits, unless it has become ``urgent``, and only for
        a bounded time so that its connection stays alive.  False when the
        scheduler was closed.
        """
        if priority is Priority.BACKGROUND:
            until = time.monotonic() + limits.BACKGROUND_PAUSE_SECONDS
            while not self._closed and self.busy and not urgent() and time.monotonic() < until:
                time.sleep(0.02)
        return not self._closed

    @property
    def busy(self) -> bool:
        """Whether somebody waits for bytes, or did a moment ago."""
        return bool(
            self._active[Priority.DEMAND]
            or self._active[Priority.PREFETCH]
            or self._queues[Priority.DEMAND]
            or self._queues[Priority.PREFETCH]
            or time.monotonic() - self._last_demand < self._quiet_seconds
        )

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def close(self, seconds: float = 5.0) -> None:
        """Drop what is queued; wait a bounded time for what runs."""
        with self._condition:
            self._closed = True
            for queue in self._queues:
                queue.clear()
            self._condition.notify_all()
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _take(self) -> tuple[Priority, Job] | None:
        with self._condition:
            while True:
                if self._closed:
                    return None
                for priority in Priority:
                    queue = self._queues[priority]
                    if not queue or self._active[priority] >= self._allowed[priority]:
                        continue
                    if priority is Priority.BACKGROUND and self.busy:
                        continue
                    return priority, self._begin(priority)
                resting = bool(self._queues[Priority.BACKGROUND])
                self._condition.wait(self._quiet_seconds / 4 if resting else None)

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            self._run(*taken)

    def _begin(self, priority: Priority) -> Job:
        self._active[priority] += 1
        if priority is Priority.DEMAND:
            self._last_begun = time.monotonic()
        job = self._queues[priority].popleft()
        self._watch()
        return job

    def _run(self, priority: Priority, job: Job) -> None:
        try:
            job()
        except Exception:
            _log.exception("fetch job failed")
        finally:
            with self._condition:
                self._active[priority] -= 1
                if priority is Priority.DEMAND:
                    self._last_demand = time.monotonic()
                self._condition.notify()
