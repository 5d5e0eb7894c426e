"""Open files, shared and bounded, and reads that do not wait for the disk."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM)

# PyDLL keeps the interpreter's lock: nothing that it calls here waits
_LIBC: Final = ctypes.PyDLL(None, use_errno=True)
_OPENAT2: Final = 437  # on every architecture
_AT_FDCWD: Final = -100
_RESOLVE_CACHED: Final = 0x20


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_cached(path: str) -> int:
    """Open for reading if the kernel can without waiting for the disk (openat2(2)).

    Raises BlockingIOError if it cannot tell, else OSError as os.open does.
    """
    how = _OpenHow(os.O_RDONLY | os.O_CLOEXEC, 0, _RESOLVE_CACHED)
    fd = _LIBC.syscall(
        _OPENAT2, _AT_FDCWD, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how)
    )
    if fd >= 0:
        return int(fd)
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:  # before Linux 5.12, or in a sandbox
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    raise OSError(number, os.strerror(number), path)


def open_to_fill(path: Path) -> int:
    """A descriptor to read and write a file, made if need be; only to read on a read-only disk."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it at ``offset``; raises OSError."""
    written = os.pwrite(fd, data, offset)
    if written == len(data):
        return
    view = memoryview(data)
    while written < len(view):
        written += os.pwrite(fd, view[written:], offset + written)


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
