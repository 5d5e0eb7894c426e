"""What a file system answers: one method per kind of request.

Every method is called on the loop thread and must not block: no network, no disk wait,
no decompression.  It either returns its answer or ``request.defer(...)`` and has a
worker call ``request.reply`` or ``request.fail`` later.

An answer is the payload as bytes, a sequence of buffers (sent without joining them),
or a positive errno; raising `FuseError` is the same as returning its errno.  Any other
exception is logged and becomes EIO.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from . import wire

if TYPE_CHECKING:
    from .session import Request


class FuseError(Exception):
    """Raised by a handler to answer with ``errno`` (1 to 511)."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class Deferred(enum.Enum):
    """The type of `DEFERRED`."""

    DEFERRED = "deferred"


DEFERRED: Final = Deferred.DEFERRED

Answer = bytes | bytearray | memoryview | Sequence[bytes | bytearray | memoryview] | int | Deferred


class Operations:
    """A file system that is read only and empty; override what yours has.

    ``nodeid`` and ``parent`` are numbers the file system chose itself in its LOOKUP and
    READDIRPLUS answers; 1 is the root.  Names are bytes without ``/`` and NUL.
    """

    def lookup(self, request: Request, parent: int, name: bytes) -> Answer:
        """`wire.entry_reply`; for a missing name `wire.negative_entry` (cached) or ENOENT."""
        return errno.ENOENT

    def getattr(self, request: Request, nodeid: int) -> Answer:
        """`wire.attr_reply`."""
        return errno.ENOENT

    def readlink(self, request: Request, nodeid: int) -> Answer:
        """The target, without a NUL; the kernel caches it."""
        return errno.EINVAL

    def open(self, request: Request, nodeid: int, flags: int) -> Answer:
        """`wire.open_reply`.

        ENOSYS at the first OPEN, as here, makes the kernel open all files of this mount
        without asking and keep their cached pages; there is no RELEASE then.
        """
        return errno.ENOSYS

    def release(self, request: Request, nodeid: int, fh: int) -> Answer:
        """Empty; only for files whose OPEN was answered."""
        return b""

    def read(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        """At most ``size`` bytes from ``offset``; fewer only at the end of the file."""
        return errno.EIO

    def opendir(self, request: Request, nodeid: int, flags: int) -> Answer:
        """As `open`; ENOSYS also lets the kernel cache directory listings."""
        return errno.ENOSYS

    def releasedir(self, request: Request, nodeid: int, fh: int) -> Answer:
        """Empty; only for directories whose OPENDIR was answered."""
        return b""

    def readdir(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        """`wire.fill` of `wire.pack_dirent` records after the cookie ``offset`` (0: from the start).

        The kernel mixes READDIR and READDIRPLUS on one directory: their cookies must be the same.
        """
        return errno.ENOTDIR

    def readdirplus(self, request: Request, nodeid: int, offset: int, size: int) -> Answer:
        """`wire.fill` of `wire.pack_direntplus` records; each counts as a LOOKUP of its node."""
        return errno.ENOTDIR

    def getxattr(self, request: Request, nodeid: int, name: bytes, size: int) -> Answer:
        """`xattr_answer`, or ENODATA.  ENOSYS would end all xattr requests of this mount."""
        return errno.ENODATA

    def listxattr(self, request: Request, nodeid: int, size: int) -> Answer:
        """`xattr_list_answer`."""
        return xattr_answer(b"", size)

    def statfs(self, request: Request, nodeid: int) -> Answer:
        """`wire.statfs_reply`."""
        return wire.statfs_reply()

    def create(self, request: Request, parent: int, name: bytes, flags: int, mode: int) -> Answer:
        """An errno: nothing can be created, but the ALS protocol signals by trying to."""
        return errno.EROFS

    def rmdir(self, request: Request, parent: int, name: bytes) -> Answer:
        """An errno: nothing can be removed, but the ALS protocol signals by trying to."""
        return errno.EROFS

    def unlink(self, request: Request, parent: int, name: bytes) -> Answer:
        """An errno."""
        return errno.EROFS

    def forget(self, nodeid: int, lookups: int) -> None:
        """The kernel gives ``lookups`` lookups of the node back.  No answer is sent."""

    def destroy(self) -> None:
        """The kernel is done with the file system (few mounts ever send this)."""


def xattr_answer(value: bytes, size: int) -> Answer:
    """Answer GETXATTR for an existing ``value``: its length if ``size`` is 0, else itself.

    ERANGE if the caller's ``size`` is too small.
    """
    if size == 0:
        return wire.xattr_size_reply(len(value))
    if len(value) > size:
        return errno.ERANGE
    return value


def xattr_list_answer(names: Iterable[bytes], size: int) -> Answer:
    """Answer LISTXATTR for the attribute ``names``, by the rule of `xattr_answer`."""
    return xattr_answer(b"".join(name + b"\0" for name in names), size)
