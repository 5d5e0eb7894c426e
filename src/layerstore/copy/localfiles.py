"""Files of an image on the local disk: below a directory, or inside a tar archive.

Transports that keep an image in files read them through a ``FileSet`` and need not know
whether the files lie in a directory or in an archive.  What is opened is a regular file: a
pipe or a device under a blob's name would make a reader hang.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from layerstore.errors import LimitExceeded, NotFound, StorageError


class LocalFile:
    """Bytes of an open file from ``start``; a context manager and a ``BlobStream``.

    Every reader has a position of its own, so many may read from one descriptor.
    """

    def __init__(
        self, descriptor: int, start: int, size: int, subject: str, *, owned: bool
    ) -> None:
        """``owned`` says that closing this closes the descriptor."""
        self._descriptor = descriptor
        self._start = start
        self._position = 0
        self._owned = owned
        self._subject = subject
        self.size = size

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes, ``b""`` only at the end; raises ``StorageError``."""
        data = self.at(self._position, n)
        self._position += len(data)
        return data

    def at(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``; the position stays."""
        wanted = max(0, min(length, self.size - offset))
        if not wanted:
            return b""
        try:
            return os.pread(self._descriptor, wanted, self._start + offset)
        except OSError as error:
            raise StorageError(said(error), subject=self._subject) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._owned and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class FileSet(Protocol):
    """Named files; thread-safe."""

    def open(self, name: str) -> LocalFile:
        """A regular file; raises ``NotFound``, ``StorageError`` and ``ContentError``."""

    def read(self, name: str, limit: int) -> bytes:
        """A small file as a whole; also raises ``LimitExceeded``."""

    def close(self) -> None:
        """No more will be read."""


class Directory:
    """The files below a directory."""

    def __init__(self, path: Path, subject: str) -> None:
        self.path = path
        self._subject = subject

    def open(self, name: str) -> LocalFile:
        """See ``FileSet``."""
        return open_file(self.path / name, f"{self._subject}: {name}")

    def read(self, name: str, limit: int) -> bytes:
        """See ``FileSet``."""
        with self.open(name) as file:
            return read_all(file, limit, f"{self._subject}: {name}")

    def close(self) -> None:
        """Nothing is kept open."""


def open_file(path: Path, subject: str) -> LocalFile:
    """Open a regular file; raises ``NotFound`` and ``StorageError``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound("there is no such file", subject=subject) from None
    except OSError as error:
        raise StorageError(said(error), subject=subject) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise StorageError("not a regular file", subject=subject)
    return LocalFile(descriptor, 0, found.st_size, subject, owned=True)


def read_all(file: LocalFile, limit: int, subject: str) -> bytes:
    """The whole of a small file; raises ``LimitExceeded``."""
    if file.size > limit:
        raise LimitExceeded(f"{file.size} bytes, more than {limit}", subject=subject)
    parts = []
    while data := file.read(limit + 1):
        parts.append(data)
    return b"".join(parts)


def scratch_directory(wanted: Path | None) -> Path:
    """Where large temporary files go: where asked, else ``$TMPDIR``, else ``/var/tmp``.

    Raises ``StorageError`` if there is no such directory.
    """
    found = wanted or Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - Podman's place
    if not found.is_dir():
        raise StorageError(
            "the directory for temporary files does not exist",
            subject=str(found),
            advice="make it, or set TMPDIR to another",
        )
    return found


def said(error: OSError) -> str:
    """What the system said, without the path."""
    return error.strerror or str(error)
