"""Private directories inside ``overlay/``: where layers are extracted, and where they go to die.

Extraction and ``rm -rf`` take long and must not be done under a lock.  So a
layer is extracted into a temporary directory and only renamed into its place
under the lock; a layer that is deleted is renamed into a temporary directory
under the lock and taken apart after it is released.

The scheme is that of containers/storage 1.59 (internal/tempdir), which older
versions do not mind: ``overlay/tempdirs/temp-dir-<x>/`` belongs to whoever
holds the POSIX lock of ``overlay/tempdirs/lock-<x>``.  Everybody may remove a
directory whose lock can be taken: its owner died.  It lies below ``overlay/``
because the tools bind-mount that directory onto itself, so that a rename from
anywhere else would cross mounts (EXDEV); and not in ``overlay/staging``, which
version 1.43 empties at each exit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import secrets
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from layerstore.errors import StorageError
from layerstore.graphroot.removal import remove_tree

_log = logging.getLogger(__name__)

TEMPDIRS: Final = "tempdirs"
_LOCK: Final = "lock-"
_DIRECTORY: Final = "temp-dir-"
_ATTEMPTS: Final = 100

# Lock files of this process: opening one of them again and closing it would drop its lock.
_held: Final[set[str]] = set()
_held_guard = threading.Lock()


class StagingLost(StorageError):
    """A staged layer whose directory somebody removed: stage it again.

    The garbage collection of containers/storage up to 1.58 takes every directory
    in ``overlay/`` that is no layer, ``tempdirs`` included.
    """


class TempDirectory:
    """One guarded temporary directory in ``root`` (``GRAPHROOT/overlay/tempdirs``).

    A context manager: the directory comes into being at its first use and is
    removed, with all that is in it, at the end.  Usable from several threads.  A
    fork's child leaves it alone.
    """

    def __init__(self, root: Path) -> None:
        self._root: Final = root
        self._numbers: Final = itertools.count()
        self._guard: Final = threading.Lock()
        self._pid: Final = os.getpid()
        self._lock: _OwnLock | None = None
        self._closed = False

    @property
    def directory(self) -> Path:
        """The directory itself."""
        with self._guard:
            if self._closed:
                raise StorageError("the temporary directory is closed", subject=str(self._root))
            if self._lock is None:
                try:
                    self._lock = _create(self._root)
                except OSError as error:
                    raise _cannot_be_made(self._root, error) from error
            return self._lock.directory

    def new(self) -> Path:
        """A fresh empty directory, mode 0700, for one layer; raises ``StorageError``."""
        path = self.directory / f"{next(self._numbers)}-addition"
        try:
            path.mkdir(0o700)
        except FileNotFoundError:
            raise StagingLost("the directory was removed", subject=str(self.directory)) from None
        except OSError as error:
            raise _cannot_be_made(path, error) from error
        return path

    def take(self, path: Path) -> None:
        """Move a file or directory of ``overlay/`` in here, to be removed at the end.

        One that does not exist is no error.  Raises ``StorageError``.
        """
        for _ in range(_ATTEMPTS):
            target = self.directory / f"{next(self._numbers)}-{path.name}"
            try:
                path.rename(target)
            except FileNotFoundError:
                if not os.path.lexists(path):
                    return
                self._lost(target.parent)
            except OSError as error:
                raise StorageError(
                    f"cannot be moved away: {error.strerror}", subject=str(path)
                ) from error
            else:
                return
        raise StorageError("the temporary directory is removed again and again", subject=str(path))

    def close(self) -> None:
        """Remove everything; a second call does nothing.

        What cannot be removed is left for others (``remove_stale``): nobody else's work
        must fail for it.
        """
        with self._guard:
            self._closed = True
            lock, self._lock = self._lock, None
        if lock is None or os.getpid() != self._pid:
            return
        try:
            remove_tree(lock.directory)
        except StorageError as error:
            _log.warning("%s", error)
        finally:
            lock.remove()
            with contextlib.suppress(OSError):
                # Old tools take every directory of overlay/ for a layer.
                self._root.rmdir()

    def _lost(self, directory: Path) -> None:
        # Somebody collected it; the next use makes another.
        with self._guard:
            if self._lock is not None and self._lock.directory == directory:
                self._lock.remove()
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


# What the puller extracts into; see ``TempDirectory.new``.
Staging = TempDirectory


def remove_stale(root: Path) -> int:
    """Remove the temporary directories in ``root`` whose owners died; how many there were."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", subject=str(root)) from error
    found = {name.removeprefix(_LOCK) for name in names if name.startswith(_LOCK)}
    found |= {name.removeprefix(_DIRECTORY) for name in names if name.startswith(_DIRECTORY)}
    removed = 0
    for word in sorted(found):
        lock = _OwnLock.try_take(root, word)
        if lock is None:
            continue
        try:
            remove_tree(lock.directory)
            removed += 1
        except StorageError as error:
            _log.warning("%s", error)
        finally:
            lock.remove()
    with contextlib.suppress(OSError):
        root.rmdir()
    return removed


class _OwnLock:
    """A held ``lock-<word>`` and the directory it stands for."""

    def __init__(self, root: Path, word: str, descriptor: int) -> None:
        self.directory: Final = root / f"{_DIRECTORY}{word}"
        self._path: Final = root / f"{_LOCK}{word}"
        self._descriptor: Final = descriptor

    @classmethod
    def try_take(cls, root: Path, word: str) -> _OwnLock | None:
        """Take the lock at once, creating its file; None if somebody holds it."""
        path = root / f"{_LOCK}{word}"
        key = os.path.realpath(path)
        with _held_guard:
            if key in _held:
                return None
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                descriptor = os.open(path, flags, 0o644)
            except FileNotFoundError:  # the root went away
                return None
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it before may have unlinked it: then this lock is nobody's.
                if os.stat(path).st_ino != os.fstat(descriptor).st_ino:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            except OSError:
                os.close(descriptor)
                return None
            _held.add(key)
        return cls(root, word, descriptor)

    def remove(self) -> None:
        """Unlink the file and let go."""
        with _held_guard:
            key = os.path.realpath(self._path)
            # One that stays is anybody's to take and remove.
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._descriptor)
            _held.discard(key)


def _create(root: Path) -> _OwnLock:
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            # not Path.mkdir(exist_ok=True): it looks again, and another process may have removed it
            root.mkdir(0o700)
        lock = _OwnLock.try_take(root, secrets.token_hex(8))
        if lock is None:
            continue
        try:
            lock.directory.mkdir(0o700)
        except FileNotFoundError:
            lock.remove()
            continue
        except BaseException:
            lock.remove()
            raise
        return lock
    raise StorageError("no temporary directory could be made", subject=str(root))


def _cannot_be_made(path: Path, error: OSError) -> StorageError:
    return StorageError(f"no directory can be made: {error.strerror}", subject=str(path))


def _forget() -> None:
    # The child of a fork holds none of its parent's locks, nor ends what its threads did.
    global _held_guard  # noqa: PLW0603 - a lock cannot be made anew
    _held_guard = threading.Lock()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
