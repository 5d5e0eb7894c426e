"""How much of the disk the store takes, against what it may take.

The *limit* is hard.  Whoever writes contents asks before each write: what is fetched ahead of
need ends at the *high* mark and at the reserve of the file system; reads on demand may go on to
the limit, and wait a moment there for room to be made.  Metadata (indexes, the database) are
counted and never refused.

What is used is counted as it is written, in whole blocks, rather too much than too little; a
measurement of the directory puts it right.  So that a start need not wait for one, a small file
says how much it is at most: it is written anew before the count passes what it says.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import NoRoom, StorageError

_CEILING_DIGITS: Final = 20


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """What the administrator allows.

    ``limit`` bounds the bytes below the store's root, None: no bound; ``high`` and ``low`` are
    the parts (0 to 1) of it at which eviction begins and ends; ``keep_free`` is the part of the
    file system that stays free of what is fetched ahead.
    """

    limit: int | None = None
    keep_free: float = limits.DISK_KEEP_FREE
    high: float = limits.DISK_HIGH
    low: float = limits.DISK_LOW

    @property
    def high_bytes(self) -> int | None:
        """Where what is fetched ahead ends, and eviction begins."""
        return None if self.limit is None else int(self.limit * self.high)

    @property
    def low_bytes(self) -> int | None:
        """Where eviction ends."""
        return None if self.limit is None else int(self.limit * self.low)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Bytes of a file system: all of it, and what is free for us."""

    size: int
    free: int

    @classmethod
    def of(cls, path: Path) -> FileSystem:
        """The one that ``path`` is on; raises StorageError."""
        try:
            found = os.statvfs(path)
        except OSError as error:
            raise StorageError(f"cannot look: {error.strerror}", subject=str(path)) from error
        return cls(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def blocks(size: int) -> int:
    """Bytes on disk of a file of ``size`` bytes, at most."""
    return -(-size // limits.DISK_BLOCK_BYTES) * limits.DISK_BLOCK_BYTES


class Room:
    """The bytes below ``root``.  Thread-safe.

    ``pressed`` is called, from whatever thread, when somebody needs room: it has it made in the
    background and answers at once.
    """

    def __init__(self, root: Path | None = None, allowed: DiskRoom | None = None) -> None:
        self.allowed: Final = allowed or DiskRoom(keep_free=0.0)
        self.pressed: Callable[[], None] = _nobody
        self.disk_full = False
        """The disk had no space for a write since room was last made."""
        self.asked = 0
        """Bytes that somebody waits to write; whoever makes room sets it back."""
        self._root = root
        limit = self.allowed.limit
        # the database and directories grow without being counted at once
        self._bound = (
            None if limit is None else limit - min(limit // 64, limits.DISK_UNCOUNTED_BYTES)
        )
        self._changed = threading.Condition()
        self._used: int | None = None
        self._added = 0
        self._hopeless_until = 0.0
        self._ceiling = 0
        self._ceiling_file: int | None = None
        if root is not None and self.allowed.limit is not None:
            self._read_ceiling(root / "used")

    def _read_ceiling(self, path: Path) -> None:
        try:
            self._ceiling_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            text = os.pread(self._ceiling_file, _CEILING_DIGITS, 0)
        except OSError as error:
            raise StorageError(f"cannot open: {error.strerror}", subject=str(path)) from error
        if len(text) == _CEILING_DIGITS and text.isdigit():
            self._used = self._ceiling = int(text)

    @property
    def used(self) -> int | None:
        """Bytes on disk, at most; None until they were measured for the first time."""
        return self._used

    @property
    def above_high(self) -> bool:
        """Whether room has to be made."""
        high = self.allowed.high_bytes
        return high is not None and self._used is not None and self._used > high

    def file_system(self) -> FileSystem:
        """The file system that the store is on; raises StorageError."""
        return FileSystem(0, 1 << 62) if self._root is None else FileSystem.of(self._root)

    def reserve(self, disk: FileSystem) -> int:
        """Bytes of the file system that are to stay free."""
        return int(disk.size * self.allowed.keep_free)

    def allows(self, size: int, *, mark: int | None = None) -> bool:
        """Whether ``size`` bytes may be fetched ahead: up to ``mark`` (the high one) and the reserve."""
        mark = self.allowed.high_bytes if mark is None else mark
        if mark is not None and (self._used is None or self._used + size > mark):
            return False
        if not self.allowed.keep_free:
            return True
        disk = self.file_system()
        return disk.free - size >= self.reserve(disk)

    def charge(self, size: int, *, ahead: bool = False) -> None:
        """``size`` bytes are about to be written; raises NoRoom if they must not be.

        What is not fetched ``ahead`` waits a bounded time for room to be made.
        """
        size = blocks(size)
        if ahead and not self.allows(size):
            raise NoRoom("the disk has no room for what is fetched ahead")
        if self._bound is None:
            return
        with self._changed:
            if not self._fits(size):
                self._wait(size)
            self._add(size)
        if self.above_high:
            self.pressed()

    def count(self, size: int) -> None:
        """So many bytes of metadata were written."""
        if self.allowed.limit is not None:
            with self._changed:
                self._add(blocks(size))

    def freed(self, size: int) -> None:
        """So many bytes were removed."""
        with self._changed:
            if self._used is not None:
                self._used = max(0, self._used - size)
            self._changed.notify_all()

    def refused(self) -> None:
        """A write failed because the disk or a quota is full."""
        self.disk_full = True
        self.pressed()

    def _fits(self, size: int) -> bool:
        return self._bound is None or self._used is None or self._used + size <= self._bound

    def _wait(self, size: int) -> None:
        until = time.monotonic() + limits.EVICTION_WAIT_SECONDS
        if self.pressed is not _nobody:
            self.asked = max(self.asked, size)
            while not self._fits(size) and time.monotonic() >= self._hopeless_until:
                self.pressed()
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    break
        if not self._fits(size):
            raise NoRoom(
                f"the store would take more than the {self.allowed.limit} bytes that it may",
                advice="raise disk.limit, or see `layerstore df`",
            )

    def hopeless(self) -> None:
        """No more room can be made at present: nobody is to wait for it."""
        with self._changed:
            self._hopeless_until = time.monotonic() + limits.EVICTION_REST_SECONDS
            self._changed.notify_all()

    def _add(self, size: int) -> None:
        self._added += size
        if self._used is not None:
            self._used += size
            if self._used > self._ceiling:
                self._raise_ceiling()

    def _raise_ceiling(self) -> None:
        if self._ceiling_file is None or self._used is None:
            return
        limit = self.allowed.limit or 0
        step = min(max(limit // 64, limits.DISK_BLOCK_BYTES), limits.DISK_COUNT_BYTES)
        self._ceiling = self._used + step
        with contextlib.suppress(OSError):  # its block is there: it fails with the disk only
            os.pwrite(self._ceiling_file, b"%020d" % self._ceiling, 0)

    # -- measuring -------------------------------------------------------------------------

    def measured_by(self, measure: Callable[[], int]) -> int:
        """Take over what ``measure`` finds, and what is written meanwhile."""
        with self._changed:
            before = self._added
        found = measure()
        with self._changed:
            # what was removed meanwhile may be in it or not: too much is counted, if anything
            self._used = found + self._added - before
            self._raise_ceiling()
            self._changed.notify_all()
        return found

    def close(self) -> None:
        """Write down what is used now."""
        with self._changed:
            if self._ceiling_file is not None:
                if self._used is not None:
                    with contextlib.suppress(OSError):
                        os.pwrite(self._ceiling_file, b"%020d" % self._used, 0)
                os.close(self._ceiling_file)
                self._ceiling_file = None


def _nobody() -> None:
    """Nobody makes room."""
