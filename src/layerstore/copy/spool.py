"""What has come of large blobs is kept, so that an interrupted pull goes on where it stopped.

``GRAPHROOT/layerstore/partial/<algorithm>-<hex>`` holds the first bytes of a compressed blob, as
they came from the registry, not verified: whoever uses them verifies the whole blob, and throws
the file away when it is not right.  The directory lies in the graph root, because there is room
for layers, and outside ``overlay*/``, where Podman would collect it.

One process at a time writes and reads a file: it holds ``flock`` on it; others do without.  A
file is removed when its layer is committed, and after a week.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Final, Self

from layerstore import limits
from layerstore.image import Digest

_log = logging.getLogger(__name__)
DIRECTORY: Final = Path("layerstore") / "partial"


class PartialBlob:
    """The file of one blob, locked until ``close`` or ``remove``.  For one thread at a time."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor
        self._size = os.fstat(descriptor).st_size

    @property
    def size(self) -> int:
        """Bytes there."""
        return self._size

    def read_at(self, offset: int, n: int) -> bytes:
        """At most ``n`` of the bytes there; ``b""`` if they cannot be read."""
        if self._descriptor is None:
            return b""
        try:
            return os.pread(self._descriptor, n, offset)
        except OSError as error:
            _log.warning("%s cannot be read: %s", self._path, error.strerror)
            return b""

    def append(self, data: bytes) -> None:
        """Keep ``data`` behind what is there; a full disk only ends the keeping."""
        if self._descriptor is None:
            return
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._descriptor, view, self._size)
                self._size += count
                view = view[count:]
        except OSError as error:
            _log.warning("%s is given up: %s", self._path, error.strerror)
            self.remove()

    def clear(self) -> None:
        """Throw away what is there: it was wrong."""
        self._size = 0
        if self._descriptor is not None:
            try:
                os.ftruncate(self._descriptor, 0)
            except OSError:
                self.remove()

    def close(self) -> None:
        """Leave the file for the next pull; an empty one is removed."""
        if self._size == 0:
            self.remove()
        self._let_go()

    def remove(self) -> None:
        """Remove the file: its layer is committed, or it is of no use."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._size = 0
        self._let_go()

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Spool:
    """The partial blobs of one graph root."""

    def __init__(self, graph_root: Path) -> None:
        self._directory = graph_root / DIRECTORY

    def open(self, digest: Digest, size: int) -> PartialBlob | None:
        """The file for a blob of ``size`` bytes; None for small ones, and where it cannot be."""
        if size < limits.SPOOL_MIN_BYTES:
            return None
        path = self._path(digest)
        try:
            self._directory.mkdir(0o700, parents=True, exist_ok=True)
            found = _locked(path, os.O_CREAT)
        except OSError as error:
            _log.warning("%s cannot be used: %s", path, error.strerror)
            return None
        if found is not None and found.size > size:
            found.clear()
        return found

    def drop(self, digest: Digest) -> None:
        """Remove what is here of a blob, unless somebody else is at it: its layer is whole."""
        path = self._path(digest)
        with contextlib.suppress(OSError):
            if (found := _locked(path, 0)) is not None:
                found.remove()

    def _path(self, digest: Digest) -> Path:
        return self._directory / f"{digest.algorithm}-{digest.hex}"

    def expire(self, *, seconds: float = limits.SPOOL_SECONDS) -> None:
        """Remove files that nobody wrote to for so long."""
        oldest = time.time() - seconds
        try:
            names = os.listdir(self._directory)
        except OSError:
            return
        for name in names:
            path = self._directory / name
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest and (found := _locked(path, 0)) is not None:
                    found.remove()


def _locked(path: Path, flags: int) -> PartialBlob | None:
    """The file, if nobody else has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat(follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino:
                return PartialBlob(path, descriptor)
            os.close(descriptor)  # removed by the one who had it, and made anew
        except FileNotFoundError:
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
