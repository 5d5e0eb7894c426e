"""``rm -rf`` for trees that come out of images: any depth, any names, no way out.

Trees of layers are hostile input. Symbolic links are never followed and mounts
never entered, and everything is done relative to open directories. A tree of
any depth needs two descriptors and no recursion: subdirectories are moved up
beside their parents before they are emptied.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from layerstore.errors import StorageError


def remove_tree(path: Path) -> None:
    """Remove a file or directory that nobody else changes; one that is not there is no error.

    What is mounted below stays, and whatever cannot be removed does not keep the
    rest from being removed; ``StorageError`` then names the first such thing.
    """
    try:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            _remove_directory(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"not everything could be removed: {error.strerror}", subject=str(path)
        ) from error


def _remove_directory(path: Path) -> None:
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        work = _Work(top)
        work.empty(top)
        while work.queue:
            work.remove(work.queue.pop())
        if work.trouble is not None:
            raise work.trouble
    finally:
        os.close(top)
    path.rmdir()


class _Work:
    """Directories, all of them directly in ``top``, that are still to be emptied."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.device = os.fstat(top).st_dev
        self.queue: list[str] = []
        self.trouble: OSError | None = None
        # "moved" names end in a number behind a word that no image can know
        self._prefix = f"moved-{secrets.token_hex(8)}-"
        self._moved = 0

    def remove(self, name: str) -> None:
        """Empty and remove one directory in ``top``."""
        try:
            directory = self._open(name)
            try:
                if os.fstat(directory).st_dev != self.device:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                self.empty(directory)
            finally:
                os.close(directory)
            os.rmdir(name, dir_fd=self.top)
        except OSError as error:
            self.trouble = self.trouble or error

    def empty(self, directory: int) -> None:
        """Unlink what is in ``directory``; its subdirectories go into ``top`` and the queue."""
        if os.fstat(directory).st_mode & 0o700 != 0o700:
            with contextlib.suppress(OSError):
                os.fchmod(directory, 0o700)
        with os.scandir(directory) as entries:
            listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_directory in listed:
            try:
                if not is_directory:
                    os.unlink(name, dir_fd=directory)
                elif directory == self.top:
                    self.queue.append(name)
                else:
                    self._move_up(directory, name)
            except OSError as error:
                self.trouble = self.trouble or error

    def _open(self, name: str) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, flags, dir_fd=self.top)
        except PermissionError:
            os.chmod(name, 0o700, dir_fd=self.top)
            return os.open(name, flags, dir_fd=self.top)

    def _move_up(self, directory: int, name: str) -> None:
        target = f"{self._prefix}{self._moved}"
        self._moved += 1
        try:
            os.rename(name, target, src_dir_fd=directory, dst_dir_fd=self.top)
        except PermissionError:
            # Renaming a directory writes its "..", which needs its own write bit (not for root).
            os.chmod(name, 0o700, dir_fd=directory)
            os.rename(name, target, src_dir_fd=directory, dst_dir_fd=self.top)
        self.queue.append(target)
