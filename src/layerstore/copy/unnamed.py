"""New files that have no name until they are whole.

A process may die at any moment, and nobody would know whether a file beside the target is
being written or was left.  A file opened with ``O_TMPFILE`` (Linux) has no name, so the
kernel takes it away with the process; ``linkat`` gives it one when it is complete.  Where the
file system knows no such files (NFS), it has a hidden name meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from layerstore.copy.localfiles import LocalFile, said
from layerstore.copy.transport import PIECE_BYTES, Pieces
from layerstore.errors import StorageError

_PREFIX: Final = ".layerstore-new-"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_MODE: Final = 0o644
_OWN_MODE: Final = 0o600
_NO_SUCH_FILES: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


class NewFile:
    """A new file, open for reading and writing; ``close`` or leaving the context ends it.

    Methods raise ``OSError``.
    """

    def __init__(self, directory: Path) -> None:
        """The file lies on the file system of ``directory``."""
        self._directory = directory
        self._temporary: Path | None = None
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE
        try:
            self.descriptor = os.open(directory, flags, _OWN_MODE)
        except OSError as error:
            if error.errno not in _NO_SUCH_FILES:
                raise
            self.descriptor, name = tempfile.mkstemp(prefix=".new-", dir=directory)
            self._temporary = Path(name)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.descriptor, view, offset)
            offset += written
            view = view[written:]

    def pieces(self, size: int, subject: str) -> Pieces:
        """The first ``size`` bytes for ``ImageDestination.put_blob``, while this is open."""

        return descriptor_pieces(self.descriptor, size, subject)

    def publish(self, target: Path) -> None:
        """Give the file, on disk, the name ``target``, in place of what had it."""
        os.fsync(self.descriptor)
        os.fchmod(self.descriptor, _FILE_MODE)
        if self._temporary is None and self._link(target):
            return
        if self._temporary is None:
            hidden = target.parent / f".new-{secrets.token_hex(8)}"
            if not self._link(hidden):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(hidden))
            self._temporary = hidden
        os.rename(self._temporary, target)
        self._temporary = None

    def close(self) -> None:
        """End it; what has not been published is gone."""
        descriptor, self.descriptor = self.descriptor, -1
        temporary, self._temporary = self._temporary, None
        if descriptor >= 0:
            os.close(descriptor)
        if temporary is not None:
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _link(self, target: Path) -> bool:
        """Give it a name that is free; otherwise return False."""
        directory = os.open(target.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Only with a descriptor does Python call linkat, which follows the link in /proc.
            os.link(
                f"/proc/self/fd/{self.descriptor}",
                target.name,
                src_dir_fd=directory,
                dst_dir_fd=directory,
                follow_symlinks=True,
            )
        except FileExistsError:
            return False
        finally:
            os.close(directory)
        return True


def descriptor_pieces(descriptor: int, size: int, subject: str) -> Pieces:
    """The first ``size`` bytes of an open file for ``ImageDestination.put_blob``."""

    def pieces() -> Iterator[bytes]:
        file = LocalFile(descriptor, 0, size, subject, owned=False)
        while data := file.read(PIECE_BYTES):
            yield data

    return pieces


def publish(path: Path, pieces: Pieces, subject: str) -> None:
    """Write a file that is whole and on disk whenever it is there; raises ``StorageError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NewFile(path.parent) as file:
            position = 0
            for piece in pieces():
                file.write(piece, position)
                position += len(piece)
            file.publish(path)
    except OSError as error:
        raise StorageError(said(error), subject=subject) from error


class NewDirectory:
    """A directory for what will be renamed to its place: those of dead processes are removed.

    It is locked while its process lives; each new one looks for others without a lock beside
    it.  Raises ``OSError``.
    """

    def __init__(self, parent: Path) -> None:
        """Make it in ``parent``."""
        _sweep(parent)
        while True:
            self.path = parent / f"{_PREFIX}{secrets.token_hex(8)}"
            self.path.mkdir(mode=0o700)
            try:
                self._descriptor = os.open(self.path, _DIRECTORY)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (FileNotFoundError, BlockingIOError):
                continue  # somebody took it for a dead one before it was locked
            if self.path.exists():
                return
            os.close(self._descriptor)

    def close(self) -> None:
        """Remove it with all in it, if it has not been renamed."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{_PREFIX}{'[0-9a-f]' * 16}"):
        try:
            descriptor = os.open(left, _DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
        except OSError:
            pass  # in use, or somebody else's
        finally:
            os.close(descriptor)
