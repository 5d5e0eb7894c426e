"""Open files, shared and bounded, and reads that do not wait for the disk."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class OpenFile:
    """A file descriptor that closes itself when its last user lets go of it."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes at ``offset``; fewer only at the end of the file."""
        data = os.pread(self.fd, size, offset)
        while len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def read_cached(self, offset: int, size: int) -> bytearray | None:
        """``size`` bytes at ``offset`` if they are in memory, else None."""
        buffer = bytearray(size)
        try:
            got = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                return None
            raise
        return buffer if got == size else None


class OpenFiles(Generic[K]):
    """The ``capacity`` most recently used open files, by key.  Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._files: OrderedDict[K, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, opener: Callable[[], int]) -> OpenFile | None:
        """The open file of ``key``; ``opener`` is called at a miss.

        None if the opener raises FileNotFoundError; its other errors pass through.
        """
        with self._lock:
            found = self._files.get(key)
            if found is not None:
                self._files.move_to_end(key)
                return found
        try:
            fresh = OpenFile(opener())
        except FileNotFoundError:
            return None
        with self._lock:
            found = self._files.setdefault(key, fresh)
            while len(self._files) > self._capacity:
                self._files.popitem(last=False)
        return found

    def drop(self, key: K) -> None:
        """Forget one file; it closes when its readers are done."""
        with self._lock:
            self._files.pop(key, None)

    def clear(self) -> None:
        """Forget all files."""
        with self._lock:
            self._files.clear()
