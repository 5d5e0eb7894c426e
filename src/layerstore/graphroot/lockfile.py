"""Lock files of the graph root: who may read or write, and whether somebody wrote.

containers/storage locks with POSIX record locks (``fcntl``) over the whole file, shared for
readers, exclusive for writers.  Such a lock belongs to the process: closing *any* descriptor of
the file gives it up, and threads do not exclude each other.  Therefore there is one ``LockFile``
a path in this process, one descriptor at a time, and a lock between our threads around it.

The content is the token of the last writer, 64 bytes that are never the same again.  Who changes
the data writes a new token, and who has data in memory compares the token to learn whether they
are still right: the time in nanoseconds, a counter, the process id, random bytes.  Only equality
means anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final

from layerstore import limits
from layerstore.errors import StorageError

TOKEN_BYTES: Final = 64
_HEAD: Final = struct.Struct("<QQI")
# A read-only file system may have no locks at all; nobody writes there through this machine.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_UNWRITABLE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT})
_COUNTER: Final = itertools.count(1)
_UNLOCKED: Final = -1


class LockFile:
    """One lock file of this process.  Get it with ``at``; threads share it.

    Threads take turns in the order in which they came; readers that stand next to each other
    read together.  Both kinds may be nested in one thread, and reading inside writing; asking to
    write inside reading is a mistake (``RuntimeError``), because two threads doing so would wait
    for each other.  After a fork the child holds nothing.
    """

    _known: ClassVar[weakref.WeakValueDictionary[Path, LockFile]] = weakref.WeakValueDictionary()
    _mutex: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path: Final = path
        self._read_only = read_only
        self._reset()

    @classmethod
    def at(cls, path: Path, *, read_only: bool = False) -> LockFile:
        """The lock file at ``path``, made when first locked.

        With ``read_only`` only ``reading`` is possible, and the file need not be writable, nor
        be there: a store on a read-only file system has no writers.
        """
        place = Path(os.path.realpath(path.parent)) / path.name
        with cls._mutex:
            known = cls._known.get(place)
            if known is None:
                known = cls._known[place] = cls(place, read_only=read_only)
            elif not read_only:
                known._read_only = False  # the next descriptor is opened for writing
            return known

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock together with other readers; raises ``StorageError``."""
        life = self._life
        self._take(write=False)
        try:
            yield
        finally:
            self._give(life)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock alone; raises ``StorageError``."""
        life = self._life
        self._take(write=True)
        try:
            yield
        finally:
            self._give(life)

    @contextlib.contextmanager
    def try_writing(self) -> Iterator[bool]:
        """Hold the lock alone if nobody holds it now; says whether that was so."""
        life = self._life
        taken = self._take(write=True, wait=False)
        try:
            yield taken
        finally:
            if taken:
                self._give(life)

    @property
    def held(self) -> bool:
        """Whether this thread holds the lock, in either way."""
        return threading.get_ident() in self._holders

    @property
    def held_for_writing(self) -> bool:
        """Whether this thread holds the lock alone."""
        return self.held and self._exclusive

    def token(self) -> bytes:
        """The last writer's token, b"" before the first write; the lock must be held."""
        self._require(self.held, "read")
        if self._descriptor == _UNLOCKED:
            return b""
        try:
            return os.pread(self._descriptor, TOKEN_BYTES, 0)
        except OSError as error:
            raise self._error("cannot be read", error) from error

    def renew(self) -> None:
        """Write a token of our own; the write lock must be held."""
        self._require(self.held_for_writing, "written")
        head = _HEAD.pack(time.time_ns(), next(_COUNTER), os.getpid() & 0xFFFFFFFF)
        token = head + secrets.token_bytes(TOKEN_BYTES - _HEAD.size)
        try:
            written = os.pwrite(self._descriptor, token, 0)
        except OSError as error:
            raise self._error("cannot be written", error) from error
        if written != TOKEN_BYTES:
            raise StorageError("was written only in part: the disk is full", subject=str(self.path))

    def __repr__(self) -> str:
        state = "free"
        if self._holders:
            state = "writing" if self._exclusive else f"{len(self._holders)} reading"
        return f"LockFile({str(self.path)!r}, {state}, {len(self._queue)} waiting)"

    @classmethod
    def _forget_in_child(cls) -> None:
        cls._mutex = threading.Lock()
        for lock in list(cls._known.values()):
            descriptor = lock._descriptor
            lock._reset()
            if descriptor != _UNLOCKED:
                os.close(descriptor)  # the parent keeps its lock: a child never had it

    # -- between threads ---------------------------------------------------------------

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._holders: dict[int, int] = {}  # thread: how often it holds the lock
        self._exclusive = False
        self._since = 0.0
        self._descriptor = _UNLOCKED
        self._life = object()  # another one after a fork

    def _take(self, *, write: bool, wait: bool = True) -> bool:
        me = threading.get_ident()
        ticket = object()
        with self._changed:
            if me in self._holders:
                if write and not self._exclusive:
                    raise RuntimeError(f"{self.path}: this thread holds the lock for reading")
                self._holders[me] += 1
                return True
            if not wait and (self._queue or self._holders):
                return False
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or not self._may_enter(write):
                    self._changed.wait()
            except BaseException:
                self._leave(ticket)
                raise
            if self._holders:  # other readers have the file lock already
                self._holders[me] = 1
                self._leave(ticket)
                return True
        # Being first in the queue keeps the others out while we wait for other processes.
        descriptor = None
        try:
            descriptor = self._lock_file(write, wait)
        finally:
            with self._changed:
                if descriptor is not None:
                    self._descriptor = descriptor
                    self._exclusive = write
                    self._since = time.monotonic()
                    self._holders[me] = 1
                self._leave(ticket)
        return descriptor is not None

    def _may_enter(self, write: bool) -> bool:
        if not self._holders:
            return True
        # Readers that keep coming would lock out the writers of other processes for ever.
        fresh = time.monotonic() - self._since < limits.LOCK_SHARE_SECONDS
        return not write and not self._exclusive and fresh

    def _leave(self, ticket: object) -> None:
        with contextlib.suppress(ValueError):  # gone in a child
            self._queue.remove(ticket)
        self._changed.notify_all()

    def _give(self, life: object) -> None:
        if life is not self._life:
            return  # the parent holds it, not this child
        me = threading.get_ident()
        with self._changed:
            self._holders[me] -= 1
            if self._holders[me]:
                return
            del self._holders[me]
            if not self._holders:
                self._exclusive = False
                descriptor, self._descriptor = self._descriptor, _UNLOCKED
                if descriptor != _UNLOCKED:
                    os.close(descriptor)  # which unlocks
            self._changed.notify_all()

    def _require(self, held: bool, what: str) -> None:
        if not held:
            raise RuntimeError(f"{self.path}: {what} without the lock")

    # -- between processes -------------------------------------------------------------

    def _lock_file(self, write: bool, wait: bool) -> int | None:
        """The locked descriptor; ``_UNLOCKED`` where there are no locks; None if taken."""
        read_only = self._read_only
        if write and read_only:
            raise StorageError("belongs to a read-only store", subject=str(self.path))
        while True:
            try:
                descriptor = self._open(read_only)
            except OSError as error:
                if read_only and error.errno in _UNWRITABLE:
                    return _UNLOCKED
                raise self._error("cannot be opened", error) from error
            try:
                locked = _lock(descriptor, write, wait)
                # Somebody may have removed the file, and made a new one, while we waited.
                if locked and os.fstat(descriptor).st_nlink:
                    kept, descriptor = descriptor, _UNLOCKED
                    return kept
                if not locked:
                    return None
            except OSError as error:
                if read_only and error.errno in _NO_LOCKS:
                    return _UNLOCKED
                raise self._error("cannot be locked", error) from error
            finally:
                if descriptor != _UNLOCKED:
                    os.close(descriptor)

    def _open(self, read_only: bool) -> int:
        flags = os.O_CREAT | os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        try:
            return os.open(self.path, flags, 0o644)
        except FileNotFoundError:
            if read_only:
                raise
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self.path, flags, 0o644)

    def _error(self, what: str, error: OSError) -> StorageError:
        return StorageError(f"{what}: {error.strerror}", subject=str(self.path))


@contextlib.contextmanager
def writing_both(one: LockFile, other: LockFile) -> Iterator[None]:
    """Hold two locks alone, and neither while waiting for the other; raises ``StorageError``.

    For locks that other programs take in either order: containers/storage 1.43 (Podman 4.3.1)
    asks for ``storage.lock`` with ``layers.lock`` in hand when it puts a lazy layer in place.
    """
    while True:
        with one.writing(), other.try_writing() as taken:
            if taken:
                yield
                return
        one, other = other, one  # so the one that was taken is waited for


def _lock(descriptor: int, write: bool, wait: bool) -> bool:
    kind = fcntl.LOCK_EX if write else fcntl.LOCK_SH
    while True:
        try:
            fcntl.lockf(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            if not wait and error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno != errno.EDEADLK:
                raise
            # The kernel sees processes, not threads, and may see a circle where there is none.
            time.sleep(limits.LOCK_RETRY_SECONDS)
        else:
            return True


os.register_at_fork(after_in_child=LockFile._forget_in_child)
