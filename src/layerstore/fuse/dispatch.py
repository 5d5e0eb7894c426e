"""From opcode to operation: takes each form of request apart and calls its method."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from . import wire
from .operations import Answer, Operations

if TYPE_CHECKING:
    from .session import Request

# Called with the request and the number of its bytes; WireError if they make no sense.
Handler = Callable[["Request", int], Answer]

_READ_ONLY: Final = (
    wire.SETATTR,
    wire.SYMLINK,
    wire.MKNOD,
    wire.MKDIR,
    wire.RENAME,
    wire.RENAME2,
    wire.LINK,
    wire.WRITE,
    wire.SETXATTR,
    wire.REMOVEXATTR,
    wire.FALLOCATE,
    wire.COPY_FILE_RANGE,
)


def table(ops: Operations, buffer: memoryview) -> list[Handler]:
    """The handler of each opcode, for requests that stand in ``buffer``."""
    lookup_op, getattr_op, read_op = ops.lookup, ops.getattr, ops.read
    parse_name, parse_read = wire.parse_name, wire.parse_read

    def lookup(request: Request, size: int) -> Answer:
        return lookup_op(request, request.nodeid, parse_name(buffer, size))

    def get_attr(request: Request, size: int) -> Answer:
        return getattr_op(request, request.nodeid)

    def readlink(request: Request, size: int) -> Answer:
        return ops.readlink(request, request.nodeid)

    def open_(request: Request, size: int) -> Answer:
        return ops.open(request, request.nodeid, wire.parse_open(buffer, size))

    def release(request: Request, size: int) -> Answer:
        return ops.release(request, request.nodeid, wire.parse_release(buffer, size))

    def read(request: Request, size: int) -> Answer:
        _, offset, wanted = parse_read(buffer, size)
        return read_op(request, request.nodeid, offset, wanted)

    def opendir(request: Request, size: int) -> Answer:
        return ops.opendir(request, request.nodeid, wire.parse_open(buffer, size))

    def releasedir(request: Request, size: int) -> Answer:
        return ops.releasedir(request, request.nodeid, wire.parse_release(buffer, size))

    def readdir(request: Request, size: int) -> Answer:
        _, offset, wanted = parse_read(buffer, size)
        return ops.readdir(request, request.nodeid, offset, wanted)

    def readdirplus(request: Request, size: int) -> Answer:
        _, offset, wanted = parse_read(buffer, size)
        return ops.readdirplus(request, request.nodeid, offset, wanted)

    def getxattr(request: Request, size: int) -> Answer:
        room, name = wire.parse_getxattr(buffer, size)
        return ops.getxattr(request, request.nodeid, name, room)

    def listxattr(request: Request, size: int) -> Answer:
        return ops.listxattr(request, request.nodeid, wire.parse_listxattr(buffer, size))

    def statfs(request: Request, size: int) -> Answer:
        return ops.statfs(request, request.nodeid)

    def create(request: Request, size: int) -> Answer:
        flags, mode, name = wire.parse_create(buffer, size)
        return ops.create(request, request.nodeid, name, flags, mode)

    def rmdir(request: Request, size: int) -> Answer:
        return ops.rmdir(request, request.nodeid, parse_name(buffer, size))

    def unlink(request: Request, size: int) -> Answer:
        return ops.unlink(request, request.nodeid, parse_name(buffer, size))

    def fixed(number: int) -> Handler:
        return lambda request, size: number

    handlers = [fixed(errno.ENOSYS)] * wire.OPCODES
    for code in _READ_ONLY:
        handlers[code] = fixed(errno.EROFS)
    handlers[wire.IOCTL] = fixed(errno.ENOTTY)
    handlers[wire.LOOKUP] = lookup
    handlers[wire.GETATTR] = get_attr
    handlers[wire.READLINK] = readlink
    handlers[wire.OPEN] = open_
    handlers[wire.RELEASE] = release
    handlers[wire.READ] = read
    handlers[wire.OPENDIR] = opendir
    handlers[wire.RELEASEDIR] = releasedir
    handlers[wire.READDIR] = readdir
    handlers[wire.READDIRPLUS] = readdirplus
    handlers[wire.GETXATTR] = getxattr
    handlers[wire.LISTXATTR] = listxattr
    handlers[wire.STATFS] = statfs
    handlers[wire.CREATE] = create
    handlers[wire.RMDIR] = rmdir
    handlers[wire.UNLINK] = unlink
    return handlers
