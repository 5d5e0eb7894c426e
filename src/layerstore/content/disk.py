"""Whether the disk takes what is written.

A disk that is full, whose quota is used up, that fails or became read only is found out by
the first write that fails.  From then on nothing is written, so that a read does not cost a
failing write, and whoever can wait does.  A thread looks every few seconds whether there is
room and whether a small file arrives; then all goes on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import DiskFull, StorageError

_log = logging.getLogger(__name__)

# EFBIG is what a limit on the size of files gives.
_NOTHING_GOES: Final = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ENXIO)
)


class Disk:
    """The file system that ``directory``, which need not be there yet, is on.  Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self.room_wanted: Callable[[], None] = lambda: None
        """Called when a write found no room.  It must not wait; whoever makes room says so with
        ``look_again``."""
        self.failed_writes = 0
        """How many writes the disk did not take, those of looking for room left out."""
        self.times = 0
        """How often it began not to take any more."""
        self._directory = directory
        self._lock = threading.Lock()
        self._reason = ""
        self._look = threading.Event()
        self._closed = False
        self._back: list[Callable[[], None]] = []

    @property
    def full(self) -> bool:
        """Whether nothing is to be written now.  Never waits."""
        return bool(self._reason)

    def when_back(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, in a thread of its own, whenever the disk takes writes again."""
        self._back.append(call)

    def check(self) -> None:
        """Raise DiskFull if nothing is to be written now."""
        if self._reason:
            raise DiskFull(f"the disk takes nothing now: {self._reason}")

    def failed(self, error: OSError, what: str, subject: str | Path) -> StorageError:
        """Take note of a write that failed; the error to raise."""
        text = error.strerror or str(error)
        if error.errno not in _NOTHING_GOES:
            return StorageError(f"{what}: {text}", subject=str(subject))
        with self._lock:
            self.failed_writes += 1
            begins = not self._reason and not self._closed
            if begins:
                self._reason = text
                self.times += 1
                self._look.clear()
                threading.Thread(target=self._wait_for_room, name="disk", daemon=True).start()
        if begins:
            _log.error("event=disk-full path=%s error=%s", self._directory, text)
        self.room_wanted()
        return DiskFull(f"{what}: {text}", subject=str(subject))

    def look_again(self) -> None:
        """There may be room now: look at once."""
        self._look.set()

    def as_dict(self) -> dict[str, object]:
        """For the status report."""
        return {
            "full": self.full,
            "reason": self._reason,
            "times_full": self.times,
            "failed_writes": self.failed_writes,
        }

    def close(self) -> None:
        """Do not look any more."""
        self._closed = True
        self._look.set()

    def _wait_for_room(self) -> None:
        while True:
            self._look.wait(limits.FULL_DISK_SECONDS)
            self._look.clear()
            if self._closed:
                return
            if self._takes():
                break
        with self._lock:
            self._reason = ""
        _log.info("event=disk-back path=%s", self._directory)
        for call in self._back:
            try:
                call()
            except Exception:
                _log.exception("something does not go on though the disk is back")

    def _takes(self) -> bool:
        """Whether there is room and a small file arrives on the disk."""
        path = self._directory / "probe"
        try:
            disk = os.statvfs(self._directory)
            if disk.f_bavail * disk.f_frsize < limits.FULL_DISK_ROOM_BYTES:
                return False
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, limits.FULL_DISK_PROBE_BYTES)
                os.pwrite(fd, b"?" * limits.FULL_DISK_PROBE_BYTES, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        return True
