"""Use counts on their way to the disk: counted at once, written by a thread."""

from __future__ import annotations

import logging
import threading

from layerstore.errors import LayerstoreError
from layerstore.provider.state import State

_log = logging.getLogger(__name__)

_END_SECONDS = 2.0


class UseCounts:
    """Changes the counts of views.  Thread-safe; `count` never waits."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._changed: set[int] = set()
        self._wanted = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="uses", daemon=True)
        self._thread.start()

    def count(self, key: int, change: int) -> None:
        """The view is used so many times more, or less."""
        with self._lock:
            self._state.count_use(key, change)
            self._changed.add(key)
        self._wanted.set()

    def save_soon(self) -> None:
        """Write what could not be written before."""
        self._wanted.set()

    def close(self) -> None:
        """Write what is not written yet."""
        self._closed = True
        self._wanted.set()
        self._thread.join(_END_SECONDS)
        self._save()

    def _run(self) -> None:
        while not self._closed:
            self._wanted.wait()
            self._wanted.clear()
            self._save()

    def _save(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, set()
        try:
            self._state.save_uses(changed)
        except LayerstoreError as error:
            _log.error("event=uses-not-saved error=%s", error)
            with self._lock:
                self._changed |= changed
