"""Bytes on their way from one thread to the next."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Final

from layerstore.turns import SMALL_FILES

_AT_ONCE: Final = 4  # pieces that wait for the next thread


class StoppedError(Exception):
    """Nobody reads any more."""


class Pieces:
    """A bounded queue of bytes between two threads; an error of the first reaches the second."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | BaseException] = queue.Queue(_AT_ONCE)
        self._stopped = False
        self._piece = b""
        self._at = 0  # of the piece at hand: cutting its head off would copy it at every read
        self._end: BaseException | None = None

    def put(self, data: bytes) -> None:
        """Hand on; raises StoppedError."""
        if self._stopped:
            raise StoppedError
        self._queue.put(data)

    def finish(self, error: BaseException | None) -> None:
        """Nothing more comes, because of ``error`` if there is one."""
        self._queue.put(error or StoppedError())

    def read(self, n: int, /, check: Callable[[], None] | None = None) -> bytes:
        """At most ``n`` bytes; ``check`` is called wherever the next piece has to be waited for."""
        at = self._at
        data = self._piece[at : at + n]
        if data:
            self._at = at + len(data)
            return data
        while not data:
            if self._end is None:
                with SMALL_FILES.left():
                    if check is not None:
                        check()
                    got = self._queue.get()
                if isinstance(got, bytes):
                    self._piece = got
                    data = got[:n]
                    self._at = len(data)
                    continue
                self._end = got
            if isinstance(self._end, StoppedError):
                return b""
            raise self._end
        return data

    def stop(self) -> None:
        """Let the first thread end: nothing more is read."""
        self._stopped = True
        while self._end is None:
            got = self._queue.get()
            if not isinstance(got, bytes):
                self._end = got
