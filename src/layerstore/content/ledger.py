"""What of the cache is known to be on the disk, and what a power failure may have spoilt.

Files are written without waiting for the disk.  Behind its last byte a file gets a *stamp*: its
modification time is a generation number, with nanoseconds that no clock writes by chance.  From
time to time the file system is synced whole, and the *mark*, a small file of its own that is
synced too, says up to which generation everything is on the disk.  A start in another boot of the
kernel reads there which generations may have been lost: files of those are *suspect*, as is every
file without a stamp.  Whoever opens a suspect file verifies its bytes first, and stamps it anew.

Generations are counted, not taken from a clock, which may jump.  A stamp that was lost leaves a
time, which is no stamp.  A failed sync makes suspect what was written since the last one.

The mark: one line of JSON, one line with its BLAKE2b.  Without a mark that can be read,
everything is suspect.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from layerstore import limits
from layerstore.content.files import OpenFile
from layerstore.errors import StorageError

_log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_SECOND: Final = 1_000_000_000
_TAG: Final = 314_159_265  # nanoseconds of a stamp
_BOOT_STEP: Final = 1000  # more than the restarts between two marks that reached the disk
_INTERVALS: Final = 8  # of suspect generations; more are joined
_REST_FACTOR: Final = 10  # a file system is synced a tenth of the time at most

_Interval = tuple[int, int]  # the generations above the first number, up to the second one


class _Mark(msgspec.Struct, frozen=True):
    boot: str
    clean: bool
    synced: int
    current: int
    suspect: tuple[_Interval, ...]


class Ledger:
    """The stamps and the mark of the cache whose private directory is ``root``.

    ``unclean`` says that work of another boot may be lost; ``failed`` that a sync failed, so that
    what is suspect may be right in memory only.  Thread-safe.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "synced"
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._late = False  # the cache may be in use by somebody else already
        self._dirty = False
        self.failed = False
        self.when_failed: Callable[[OSError], None] = lambda _: None
        """Called when a sync failed, with its error."""
        self.resting: Callable[[], bool] = lambda: False
        """Whether the disk takes nothing now, so that a sync would be in vain."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: Callable[[], None] = lambda: None
        self._boot = _boot_id()
        try:
            # kept open: syncfs tells of errors since then
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._directory = OpenFile(os.open(root, flags))
            self._device = os.stat(self._directory.fd).st_dev
        except OSError as error:
            raise StorageError(f"cannot open: {error.strerror}", subject=str(root)) from error
        self._begin(self._read())

    def _begin(self, last: _Mark | None) -> None:
        self._suspect: tuple[_Interval, ...]
        same = last is not None and bool(self._boot) and last.boot == self._boot
        self.unclean = not same and not (last is not None and last.clean)
        if last is None:
            end = int(time.time()) // 2  # above every generation so far, below every time
            self._synced, self._suspect, self._current = 0, ((0, end),), end + 1
        elif same or last.clean:
            # one generation may have begun of which the mark knows nothing
            self._synced, self._suspect, self._current = last.synced, last.suspect, last.current + 2
        else:
            end = last.current + _BOOT_STEP
            self._synced, self._suspect, self._current = last.synced, last.suspect, end + 1
            self._suspect_more(end)
        # only a mark that will still be there after a power failure gives new stamps their meaning
        self._marked = last is not None and same and not last.clean
        if last is not None and last.clean:  # that must end before anything is written
            try:
                self._write(clean=False)
            except StorageError:  # the disk is full, perhaps: without a mark all is suspect
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def _suspect_more(self, end: int) -> None:
        """Whatever was not synced before generation ``end`` was over."""
        suspect = (*self._suspect, (self._synced, end))
        while len(suspect) > _INTERVALS:
            suspect = ((suspect[0][0], suspect[1][1]), *suspect[2:])
        self._suspect = suspect

    # -- stamps --------------------------------------------------------------------

    def stamp(self, file: int) -> None:
        """All bytes of the file are written, or were verified.  Raises OSError."""
        self._dirty = True
        if self._marked and not self._late:  # another's mark may tell of our generation already
            os.utime(file, ns=(time.time_ns(), self._current * _SECOND + _TAG))

    def distrust(self, file: int) -> None:
        """The bytes were found wrong: whoever opens the file is to see for himself.

        Raises OSError.
        """
        os.utime(file, ns=(time.time_ns(), 0))

    def trusts(self, file: int | str) -> bool:
        """Whether the file's bytes need no verification; False for what is not there."""
        try:
            found = os.stat(file)
        except OSError:
            return False
        generation, tag = divmod(found.st_mtime_ns, _SECOND)
        return (
            tag == _TAG
            and found.st_dev == self._device
            and generation <= self._current
            and not any(first < generation <= last for first, last in self._suspect)
        )

    # -- the mark ------------------------------------------------------------------

    def keep_syncing(self, before: Callable[[], None] = lambda: None) -> None:
        """Sync from time to time, in a thread; ``before`` may write what is to be synced, too."""
        self._before = before
        self._thread = threading.Thread(target=self._work, name="sync", daemon=True)
        self._thread.start()

    def sync(self) -> None:
        """Have all that is stamped by now on the disk, and remember that.

        Raises StorageError; what was not synced by then is suspect.
        """
        self._sync(clean=False)

    def _sync(self, *, clean: bool) -> None:
        with self._lock:
            # whoever stamps with an older generation wrote his bytes before this
            done, self._current, self._dirty = self._current, self._current + 1, False
            if _LIBC.syncfs(self._directory.fd):
                number = ctypes.get_errno()
                self.failed = self._dirty = True
                self._suspect_more(done)
                self.when_failed(OSError(number, os.strerror(number)))
                raise StorageError(f"cannot sync: {os.strerror(number)}", subject=str(self._path))
            self._synced = done
            with self._writing:
                if not self._late:
                    self._write(clean=clean)

    def _work(self) -> None:
        rest = 0.0
        while not self._stop.wait(rest):
            rest = limits.SYNC_SECONDS
            began = time.monotonic()
            if self.resting():
                continue
            try:
                if not self._marked:
                    with self._lock:
                        self._write(clean=False)
                elif self._dirty:
                    self._before()
                    self.sync()
            except StorageError as error:
                _log.error("event=sync-failed error=%s", error)
            rest = max(rest, _REST_FACTOR * (time.monotonic() - began))

    def close(self) -> None:
        """Stop; what was not synced will be suspect in another boot."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(limits.SYNC_STOP_SECONDS)

    def end(self, *, clean: bool = True) -> None:
        """Stop with everything on the disk, so that no boot suspects anything.

        Not ``clean``: somebody still writes, so another boot suspects what comes after this.
        Gives up after a bounded time.
        """
        self.close()
        last = threading.Thread(target=self._end, args=(clean,), daemon=True)
        last.start()
        last.join(limits.SYNC_STOP_SECONDS)
        with self._writing:
            self._late = True

    def _end(self, clean: bool) -> None:
        try:
            self._sync(clean=clean)
        except StorageError as error:
            _log.error("event=sync-failed error=%s", error)

    def _read(self) -> _Mark | None:
        try:
            line, _, check = self._path.read_bytes().partition(b"\n")
            if check.strip() != _checksum(line):
                return None
            return msgspec.json.decode(line, type=_Mark)
        except (OSError, msgspec.MsgspecError):
            return None

    def _write(self, *, clean: bool) -> None:
        mark = _Mark(self._boot, clean, self._synced, self._current, self._suspect)
        line = msgspec.json.encode(mark)
        fresh = self._path.with_name("synced.new")
        try:
            with fresh.open("wb") as out:
                out.write(line + b"\n" + _checksum(line) + b"\n")
                out.flush()
                os.fsync(out.fileno())
            os.replace(fresh, self._path)
            os.fsync(self._directory.fd)
        except OSError as error:
            raise StorageError(
                f"cannot write: {error.strerror}", subject=str(self._path)
            ) from error
        self._marked = True


def _checksum(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).hexdigest().encode()


def _boot_id() -> str:
    """What identifies this run of the kernel; empty if it is not told."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
