"""Bytes that the disk did not take: the most recently used of them, in memory.

Two kinds lie here: compressed units of blobs as they came, by file and number, which are
verified when they are taken out as those on disk are; and verified chunks, by their SHA-256.
What a reader waits for stays until the reader was told.  So that it does not become too much,
readers are *admitted*: of many at once some wait for their turn.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from layerstore import limits

Key = tuple[Path, int] | bytes
"""A unit of a blob, or a chunk."""

_ENTRY_BYTES: Final = 256  # what an entry costs beside its bytes


class Shelf:
    """At most ``capacity`` bytes, or one piece that is larger; and as much under way.

    Thread-safe.
    """

    def __init__(self, capacity: int = limits.HELD_BYTES) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[Key, bytes] = OrderedDict()
        self._size = 0
        self._under_way = 0
        self._kept: Counter[Key] = Counter()
        self._admitted = 0
        self._turns: deque[tuple[Collection[Key], int, Callable[[], None]]] = deque()
        self._condition = threading.Condition()

    def put(self, key: Key, data: bytes | memoryview) -> None:
        """Keep a copy of ``data``; what was used longest ago goes for it."""
        fresh = bytes(data)
        with self._condition:
            self._remove(key)
            self._entries[key] = fresh
            self._size += len(fresh) + _ENTRY_BYTES
            for _ in range(len(self._entries) - 1):
                if self._size <= self._capacity:
                    break
                oldest = next(iter(self._entries))
                if self._kept[oldest]:
                    self._entries.move_to_end(oldest)
                else:
                    self._remove(oldest)

    def get(self, key: Key) -> bytes | None:
        """What is kept under ``key``."""
        with self._condition:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def units(self, path: Path) -> list[int]:
        """The units of a blob that are kept."""
        with self._condition:
            keys = list(self._entries)
        return [key[1] for key in keys if isinstance(key, tuple) and key[0] == path]

    def drop(self, key: Key) -> None:
        """Keep it no longer."""
        with self._condition:
            self._remove(key)

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        with self._condition:
            return self._size

    def admit(self, keys: Collection[Key], size: int, begin: Callable[[], None]) -> None:
        """Call ``begin`` when there is room for these ``size`` bytes; they stay until release()."""
        with self._condition:
            self._turns.append((keys, size, begin))
        self._next_turns()

    def release(self, keys: Collection[Key], size: int) -> None:
        """What was admitted may go: its reader has it."""
        with self._condition:
            self._kept.subtract(keys)
            self._kept += Counter()  # forget those at zero
            self._admitted -= size
        self._next_turns()

    def _next_turns(self) -> None:
        while True:
            with self._condition:
                if not self._turns:
                    return
                keys, size, begin = self._turns[0]
                if self._admitted and self._admitted + size > self._capacity // 2:
                    return
                self._turns.popleft()
                self._kept.update(keys)
                self._admitted += size
            begin()

    @contextmanager
    def under_way(self, size: int) -> Iterator[None]:
        """Room for ``size`` bytes that come; waits until others have arrived."""
        with self._condition:
            while self._under_way and self._under_way + size > self._capacity:
                self._condition.wait()
            self._under_way += size
        try:
            yield
        finally:
            with self._condition:
                self._under_way -= size
                self._condition.notify_all()

    def _remove(self, key: Key) -> None:
        found = self._entries.pop(key, None)
        if found is not None:
            self._size -= len(found) + _ENTRY_BYTES
