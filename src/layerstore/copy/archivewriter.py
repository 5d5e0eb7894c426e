"""Writing a tar archive of known files, several at once.

The length of each file is known before its bytes come, so its place in the archive is
reserved and its bytes are written there while others are written elsewhere.  The archive
has no name until it is whole; a target that is no regular file,
such as ``/dev/stdout``, gets it in one piece at the end.
"""

from __future__ import annotations

import os
import stat
import tarfile
import threading
from pathlib import Path
from typing import Final

from layerstore.copy.localfiles import said, scratch_directory
from layerstore.copy.transport import Pieces, file_pieces
from layerstore.copy.unnamed import NewFile
from layerstore.errors import StorageError, UsageError

_MODE: Final = 0o444
_END: Final = bytes(2 * tarfile.BLOCKSIZE)


class ArchiveWriter:
    """One archive on its way; thread-safe.  ``finish`` or ``abort`` ends it."""

    def __init__(self, target: Path, subject: str, *, scratch: Path | None = None) -> None:
        """Raises ``StorageError``."""
        self._subject = subject
        self._lock = threading.Lock()
        self._end = 0
        try:
            self._special = _is_special(target)
            # The name behind a link to a pipe is none that could be opened.
            self._target = target if self._special else Path(os.path.realpath(target))
            directory = scratch_directory(scratch) if self._special else self._target.parent
            self._file = NewFile(directory)
        except OSError as error:
            raise StorageError(said(error), subject=subject) from error

    def add(self, name: str, data: bytes) -> None:
        """Add a small file."""
        self.add_blob(name, lambda: (data,), len(data))

    def add_blob(self, name: str, pieces: Pieces, size: int) -> None:
        """Add a file of ``size`` bytes; an error of the pieces passes on."""
        start = self._reserve(_header(name, size))
        position, end = start, start + size
        try:
            for piece in pieces():
                if position + len(piece) > end:
                    raise UsageError(f"more than {size} bytes given", subject=name)
                self._file.write(piece, position)
                position += len(piece)
        except OSError as error:
            raise StorageError(said(error), subject=self._subject) from error
        if position != end:
            raise UsageError(f"{size} bytes announced, {position - start} given", subject=name)

    def add_file(self, name: str, path: Path) -> None:
        """Add a copy of a file on disk."""
        try:
            size = path.stat().st_size
            self.add_blob(name, file_pieces(path), size)
        except OSError as error:
            raise StorageError(said(error), subject=self._subject) from error

    def add_link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        info = tarfile.TarInfo(name)
        info.type = tarfile.SYMTYPE
        info.linkname = target
        info.mode = 0o777
        self._reserve((_encode(info), 0))

    def finish(self) -> None:
        """Give the archive its name; raises ``StorageError``."""
        try:
            self._file.write(_END, self._end)
            if self._special:
                with self._target.open("wb") as out:
                    for piece in self._file.pieces(self._end + len(_END), self._subject)():
                        out.write(piece)
            else:
                self._file.publish(self._target)
                sync_directory(self._target.parent)
        except OSError as error:
            raise StorageError(said(error), subject=self._subject) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Leave nothing behind; does nothing after ``finish``."""
        self._file.close()

    def _reserve(self, wanted: tuple[bytes, int]) -> int:
        """Write a header; return where the payload belongs."""
        header, size = wanted
        with self._lock:
            start = self._end + len(header)
            self._end = start + size + -size % tarfile.BLOCKSIZE
            end = self._end
            try:
                self._file.write(header, start - len(header))
                # Padding is the hole that this leaves.
                if os.fstat(self._file.descriptor).st_size < end:
                    os.ftruncate(self._file.descriptor, end)
            except OSError as error:
                raise StorageError(said(error), subject=self._subject) from error
        return start


def sync_directory(path: Path) -> None:
    """Make renames in a directory last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(name: str, size: int) -> tuple[bytes, int]:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = _MODE
    return _encode(info), size


def _encode(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _is_special(path: Path) -> bool:
    if path.parts[:2] in (("/", "dev"), ("/", "proc")):
        return True  # standard output may be a regular file, but it has no name to take
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, "is a directory", str(path))
    return not stat.S_ISREG(mode)
