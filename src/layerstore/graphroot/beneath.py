"""Paths inside a directory tree that came out of an image, walked so that none leads out of it.

Every directory is reached from the root by descriptors, one component at a time, and the kernel
never follows a symbolic link for us: a link on the way is read and walked here, absolute targets
and ``..`` relative to the tree's own root, as a process that has it as its root would do.
Descriptors are kept, because entries of one directory come together.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from layerstore import limits
from layerstore.errors import InvalidLayer, LimitExceeded

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KEPT_ON_THE_WAY: Final = 16  # directories entered at once whose descriptors are all kept
_SYMLINKS: Final = 40  # followed on one path, as the kernel does


class Beneath:
    """The tree below ``root``; a context manager that holds descriptors.  Not thread-safe.

    Paths are bytes without a leading ``/``; ``b""`` is the root.  ``make(directory, name)`` makes
    and opens a missing directory where that is allowed.  All methods raise OSError.
    """

    def __init__(self, root: Path, make: Callable[[int, bytes], int] | None = None) -> None:
        # The root itself may be named through links: `l/` is full of them.
        self.root: Final = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # by path; the extractor looks here before it calls us
        self.open: Final[dict[bytes, int]] = {b"": self.root}
        self._make = make

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self.open.values():
            os.close(fd)
        self.open.clear()

    def trim(self) -> None:
        """Close what is kept when it is much: descriptors given out before may be closed."""
        if len(self.open) > limits.OPEN_DIRECTORIES:
            self.forget(keep=self.root)

    def forget(self, *, keep: int) -> None:
        """Close every descriptor but the root's and ``keep``."""
        for path, fd in list(self.open.items()):
            if fd not in (self.root, keep):
                del self.open[path]
                os.close(fd)

    def directory(self, path: bytes, *, create: bool = False) -> int:
        """A descriptor of a directory; it stays ours.  With ``create`` missing ones are made."""
        known = path
        while (fd := self.open.get(known)) is None:
            known = known.rpartition(b"/")[0]
        if known == path:
            return fd
        steps = path[len(known) :].lstrip(b"/").split(b"/")
        if len(steps) > _KEPT_ON_THE_WAY:
            fd = self.open[path] = self._resolve(path, create=create)
            return fd
        for name in steps:
            child = self._step(fd, name, create=create)
            if child is None:
                fd = self.open[path] = self._resolve(path, create=create)
                return fd
            known = known + b"/" + name if known else name
            fd = self.open[known] = child
        return fd

    def stat(self, path: bytes) -> os.stat_result | None:
        """What is at ``path``, a link itself at its end; None if nothing is."""
        if not path:
            return os.fstat(self.root)
        parent, _, name = path.rpartition(b"/")
        try:
            directory = self.directory(parent)
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open_file(self, path: bytes) -> int:
        """A new descriptor of a regular file, to read.  OSError (EINVAL) for anything else."""
        parent, _, name = path.rpartition(b"/")
        fd = os.open(name, _FILE, dir_fd=self.directory(parent))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file")
        return fd

    def _step(self, directory: int, name: bytes, *, create: bool) -> int | None:
        """Open a directory by its name; None for a symbolic link."""
        try:
            return open_directory(directory, name)
        except FileNotFoundError:
            if not create or self._make is None:
                raise
            return self._make(directory, name)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISLNK(found.st_mode):
                raise
            return None

    def _resolve(self, path: bytes, *, create: bool) -> int:
        """Open a directory whose path is long or has symbolic links; the result is the caller's."""
        # Names still to go, the next one last; a link's own text never makes directories.
        ahead = [(name, create) for name in reversed(path.split(b"/"))]
        links = 0
        depth = 0
        here = os.dup(self.root)
        try:
            while ahead:
                name, may_create = ahead.pop()
                if name in (b"", b".") or (name == b".." and not depth):
                    continue  # the root is its own parent
                if name == b"..":
                    following: int | None = os.open("..", _DIRECTORY, dir_fd=here)
                    depth -= 1
                else:
                    following = self._step(here, name, create=may_create)
                    depth += 1
                if following is None:
                    depth -= 1
                    links += 1
                    if links > _SYMLINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    target = os.readlink(name, dir_fd=here)
                    ahead += [(part, False) for part in reversed(target.split(b"/"))]
                    if not target.startswith(b"/"):
                        continue
                    following, depth = os.dup(self.root), 0
                os.close(here)
                here = following
        except BaseException:
            os.close(here)
            raise
        return here


def open_directory(parent: int, name: bytes) -> int:
    """Open the directory ``name``, no symbolic link, in an open one.  Raises OSError."""
    return os.open(name, _DIRECTORY, dir_fd=parent)


def through(directory: int, name: bytes) -> bytes:
    """A path for calls that take no descriptor of a directory; not to be followed at its end."""
    return b"/proc/self/fd/%d/%b" % (directory, name)


def clean(name: bytes) -> bytes:
    """A path of the archive, relative to the root of the layer, which is ``b""``.

    A leading ``/`` means the layer's root.  ``..`` takes back a component before it, as in Go's
    ``filepath.Clean``.  Raises InvalidLayer when it would climb out of the layer, LimitExceeded.
    """
    if len(name) > limits.PATH_BYTES:
        raise LimitExceeded(
            f"a path of more than {limits.PATH_BYTES} bytes",
            subject=name[:256].decode(errors="replace"),
        )
    if name[:1] != b"." and b"/." not in name and b"//" not in name and name[:1] != b"/":
        return name[:-1] if name[-1:] == b"/" else name
    path = posixpath.normpath(name.lstrip(b"/")) if name.strip(b"/") else b"."
    if path == b".." or path.startswith(b"../"):
        raise InvalidLayer(
            "the path leaves the layer by '..'", subject=name[:256].decode(errors="replace")
        )
    return b"" if path == b"." else path
