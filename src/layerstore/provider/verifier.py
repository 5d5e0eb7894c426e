"""A thread that checks complete layers, one after the other."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from layerstore.errors import LayerstoreError
from layerstore.provider import memory

_log = logging.getLogger(__name__)


class Verifier:
    """Calls ``check`` with each slot that was submitted.  Thread-safe."""

    def __init__(self, check: Callable[[int], None]) -> None:
        self._check = check
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Event] = {}
        self._thread = threading.Thread(target=self._work, name="verify", daemon=True)
        self._thread.start()

    def submit(self, slot: int) -> threading.Event:
        """Check a layer; the event is set when that is done, whatever came out."""
        with self._lock:
            known = self._waiting.get(slot)
            if known is not None:
                return known
            done = self._waiting[slot] = threading.Event()
        self._queue.put(slot)
        return done

    def close(self, seconds: float = 1.0) -> None:
        """Begin nothing more; wait a bounded time for what runs."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (slot := self._queue.get()) is not None:
            try:
                self._check(slot)
            except LayerstoreError as error:
                _log.warning("event=layer-not-verified slot=%d error=%s", slot, error)
            except Exception:
                _log.exception("the check of layer %d failed", slot)
            finally:
                memory.give_back()
                with self._lock:
                    self._waiting.pop(slot).set()
