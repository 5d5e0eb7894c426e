"""The FUSE wire protocol: constants, reply builders and request parsers.

Each read of ``/dev/fuse`` gives one request: a 40 byte header, then a body whose
form depends on the opcode; each write is one answer: a 16 byte header and a
payload.  All numbers are little endian here (every machine this runs on is).
Source: the kernel's ``include/uapi/linux/fuse.h``, protocol 7.31 to 7.45.

Builders return ``bytes`` ready to be a payload.  Parsers take the request buffer
and the number of valid bytes in it and raise `WireError` for anything that is
too short, too long or not terminated; nothing else leaves them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import ClassVar, Final, NamedTuple

from layerstore.errors import Fault, LayerstoreError

# -- opcodes -------------------------------------------------------------------
LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
FLUSH: Final = 25
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
GETLK: Final = 31
SETLK: Final = 32
SETLKW: Final = 33
ACCESS: Final = 34
CREATE: Final = 35
INTERRUPT: Final = 36
BMAP: Final = 37
DESTROY: Final = 38
IOCTL: Final = 39
POLL: Final = 40
NOTIFY_REPLY: Final = 41
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
SETUPMAPPING: Final = 48
REMOVEMAPPING: Final = 49
SYNCFS: Final = 50
TMPFILE: Final = 51
STATX: Final = 52
OPCODES: Final = 64  # a table indexed by opcode has this many places

OPCODE_NAMES: Final[dict[int, str]] = {
    number: name
    for name, number in list(globals().items())
    if name.isupper() and type(number) is int and name != "OPCODES"
}

# -- INIT flags ----------------------------------------------------------------
ASYNC_READ: Final = 1 << 0
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
NO_OPEN_SUPPORT: Final = 1 << 17
PARALLEL_DIROPS: Final = 1 << 18
POSIX_ACL: Final = 1 << 20
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23
NO_OPENDIR_SUPPORT: Final = 1 << 24
INIT_EXT: Final = 1 << 30
PASSTHROUGH: Final = 1 << 37
HAS_RESEND: Final = 1 << 39
ALLOW_IDMAP: Final = 1 << 40

# -- other flags ---------------------------------------------------------------
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_NONSEEKABLE: Final = 1 << 2
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PASSTHROUGH: Final = 1 << 7

NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
NOTIFY_RESEND: Final = 7
UNIQUE_RESEND: Final = 1 << 63  # set in `unique` of a request that is sent again

DEV_IOC_BACKING_OPEN: Final = 0x4010E501
DEV_IOC_BACKING_CLOSE: Final = 0x4004E502

ROOT_ID: Final = 1
KERNEL_MAJOR: Final = 7
PAGE_BYTES: Final = 4096
MIN_READ_BUFFER: Final = 8192

# Validity "for ever", in seconds.  The kernel clamps it to its own largest time-out.
FOREVER: Final = (1 << 63) - 1

# -- layouts -------------------------------------------------------------------
IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
OUT_HEADER: Final = struct.Struct("<IiQ")
ATTR: Final = struct.Struct("<6Q10I")
ENTRY_OUT: Final = struct.Struct("<4Q2I6Q10I")
ATTR_OUT: Final = struct.Struct("<QII6Q10I")
OPEN_OUT: Final = struct.Struct("<QIi")
STATFS_OUT: Final = struct.Struct("<5Q4I24x")
GETXATTR_OUT: Final = struct.Struct("<II")
DIRENT: Final = struct.Struct("<QQII")
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHII24x")
_INIT_IN: Final = struct.Struct("<IIII")
_INIT_IN_FLAGS2: Final = struct.Struct("<I")
_READ_IN: Final = struct.Struct("<QQIIQII")
_GETXATTR_IN: Final = struct.Struct("<II")
_CREATE_IN: Final = struct.Struct("<IIII")
_OPEN_IN: Final = struct.Struct("<II")
_RELEASE_IN: Final = struct.Struct("<QIIQ")
_INTERRUPT_IN: Final = struct.Struct("<Q")
_FORGET_IN: Final = struct.Struct("<Q")
_FORGET_ONE: Final = struct.Struct("<QQ")
_BATCH_FORGET_IN: Final = struct.Struct("<II")
_INVAL_INODE_OUT: Final = struct.Struct("<Qqq")
_INVAL_ENTRY_OUT: Final = struct.Struct("<QII")
_BACKING_MAP: Final = struct.Struct("<iIQ")

HEADER_BYTES: Final = IN_HEADER.size
OUT_HEADER_BYTES: Final = OUT_HEADER.size
_U32: Final = 0xFFFFFFFF
_U64: Final = 0xFFFFFFFFFFFFFFFF
_NS: Final = 1_000_000_000
_PADDING: Final = tuple(b"\0" * n for n in range(8))


class WireError(LayerstoreError):
    """A request from the kernel (or whoever is at the other end) that breaks the protocol."""

    code: ClassVar[str] = "fuse-wire"
    fault: ClassVar[Fault] = Fault.LOCAL


# -- values --------------------------------------------------------------------
class Attr(NamedTuple):
    """What ``stat`` shows of one inode.

    ``mode`` holds type and permission bits, times are nanoseconds since the epoch
    (negative ones too), ``blocks`` counts 512 bytes, ``rdev`` is as `os.makedev` gives it.
    """

    ino: int
    mode: int
    size: int = 0
    blocks: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    blksize: int = PAGE_BYTES


class InitIn(NamedTuple):
    """The kernel's side of the negotiation; ``flags`` has flags2 in its upper half."""

    major: int
    minor: int
    max_readahead: int
    flags: int


def encode_dev(major: int, minor: int) -> int:
    """The kernel's ``new_encode_dev``: the 32 bit form of a device number."""
    return ((minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)) & _U32


# -- replies -------------------------------------------------------------------
def _attr_fields(attr: Attr) -> tuple[int, ...]:
    ino, mode, size, blocks, atime, mtime, ctime, nlink, uid, gid, rdev, blksize = attr
    m_s, m_ns = divmod(mtime, _NS)
    a_s, a_ns = (m_s, m_ns) if atime == mtime else divmod(atime, _NS)
    c_s, c_ns = (m_s, m_ns) if ctime == mtime else divmod(ctime, _NS)
    return (
        ino,
        size,
        blocks,
        a_s & _U64,
        m_s & _U64,
        c_s & _U64,
        a_ns,
        m_ns,
        c_ns,
        mode,
        nlink,
        uid,
        gid,
        rdev & _U32,
        blksize,
        0,
    )


def pack_attr(attr: Attr) -> bytes:
    """``struct fuse_attr``, 88 bytes."""
    return ATTR.pack(*_attr_fields(attr))


def entry_reply(
    nodeid: int, attr: Attr, entry_valid_s: int = FOREVER, attr_valid_s: int = FOREVER
) -> bytes:
    """The answer to LOOKUP: the node found and how long name and attributes may be cached."""
    return ENTRY_OUT.pack(nodeid, 0, entry_valid_s, attr_valid_s, 0, 0, *_attr_fields(attr))


def negative_entry(valid_s: int = FOREVER) -> bytes:
    """The answer to LOOKUP for a name that is not there, to be cached (plain ENOENT is not)."""
    return ENTRY_OUT.pack(0, 0, valid_s, 0, 0, 0, *(0,) * 16)


def attr_reply(attr: Attr, attr_valid_s: int = FOREVER) -> bytes:
    """The answer to GETATTR."""
    return ATTR_OUT.pack(attr_valid_s, 0, 0, *_attr_fields(attr))


def open_reply(fh: int = 0, flags: int = FOPEN_KEEP_CACHE, backing_id: int = 0) -> bytes:
    """The answer to OPEN and OPENDIR; ``flags`` are FOPEN_*."""
    return OPEN_OUT.pack(fh, flags, backing_id)


def statfs_reply(
    *,
    blocks: int = 0,
    bfree: int = 0,
    bavail: int = 0,
    files: int = 0,
    ffree: int = 0,
    bsize: int = PAGE_BYTES,
    namelen: int = 255,
) -> bytes:
    """The answer to STATFS; blocks are counted in ``bsize``."""
    return STATFS_OUT.pack(blocks, bfree, bavail, files, ffree, bsize, namelen, bsize, 0)


def xattr_size_reply(size: int) -> bytes:
    """The answer to GETXATTR and LISTXATTR that asked with size 0."""
    return GETXATTR_OUT.pack(size, 0)


def pack_dirent(ino: int, cookie: int, kind: int, name: bytes) -> bytes:
    """One ``fuse_dirent``; ``cookie`` is the offset to go on from, ``kind`` a DT_* number."""
    return DIRENT.pack(ino, cookie, len(name), kind) + name + _PADDING[-len(name) & 7]


def pack_direntplus(entry: bytes, ino: int, cookie: int, kind: int, name: bytes) -> bytes:
    """One ``fuse_direntplus``; ``entry`` is what LOOKUP of the name would answer.

    ``.`` and ``..`` go with `negative_entry` (node 0: the kernel looks nothing up for them).
    """
    return b"".join(
        (entry, DIRENT.pack(ino, cookie, len(name), kind), name, _PADDING[-len(name) & 7])
    )


def fill(records: Iterable[bytes], size: int) -> bytes:
    """As many whole leading ``records`` as fit into ``size`` bytes.

    The payload of READDIR and READDIRPLUS; empty means the end of the directory.
    """
    taken: list[bytes] = []
    room = size
    for record in records:
        room -= len(record)
        if room < 0:
            break
        taken.append(record)
    return b"".join(taken)


# -- notifications: unsolicited messages to the kernel ---------------------------
def _notification(code: int, body: bytes = b"") -> bytes:
    return OUT_HEADER.pack(OUT_HEADER_BYTES + len(body), code, 0) + body


def resend_notification() -> bytes:
    """Ask for every request again that was read but not answered (Linux 6.9)."""
    return _notification(NOTIFY_RESEND)


def inval_inode_notification(nodeid: int, offset: int = 0, length: int = 0) -> bytes:
    """Forget attributes and, from ``offset`` on, cached pages; a negative offset: no pages."""
    return _notification(NOTIFY_INVAL_INODE, _INVAL_INODE_OUT.pack(nodeid, offset, length))


def inval_entry_notification(parent: int, name: bytes) -> bytes:
    """Forget what ``name`` in ``parent`` was."""
    body = _INVAL_ENTRY_OUT.pack(parent, len(name), 0) + name + b"\0"
    return _notification(NOTIFY_INVAL_ENTRY, body)


def backing_map(fd: int) -> bytearray:
    """The argument of the DEV_IOC_BACKING_OPEN ioctl (passthrough)."""
    return bytearray(_BACKING_MAP.pack(fd, 0, 0))


# -- requests ------------------------------------------------------------------
Buffer = bytes | bytearray | memoryview


def _short(what: str, size: int) -> WireError:
    return WireError(f"a {what} request of {size} bytes")


def parse_name(buffer: Buffer, size: int, start: int = HEADER_BYTES) -> bytes:
    """The one NUL-terminated name that fills the body from ``start`` to the end."""
    end = size - 1
    if end <= start or buffer[end] != 0:
        raise WireError("a request without a terminated name")
    name = bytes(buffer[start:end])
    if 0 in name:
        raise WireError("a request with more than one name where one belongs")
    return name


def parse_init(buffer: Buffer, size: int) -> InitIn:
    """INIT, in the short form of old kernels and the long one with flags2."""
    if size < HEADER_BYTES + _INIT_IN.size:
        raise _short("INIT", size)
    major, minor, readahead, flags = _INIT_IN.unpack_from(buffer, HEADER_BYTES)
    if flags & INIT_EXT:
        at = HEADER_BYTES + _INIT_IN.size
        if size < at + 4:
            raise _short("INIT", size)
        flags |= _INIT_IN_FLAGS2.unpack_from(buffer, at)[0] << 32
    return InitIn(major, minor, readahead, flags)


def parse_read(buffer: Buffer, size: int) -> tuple[int, int, int]:
    """READ, READDIR and READDIRPLUS: (file handle, offset, number of bytes wanted)."""
    if size < HEADER_BYTES + _READ_IN.size:
        raise _short("READ", size)
    fh, offset, wanted, *_ = _READ_IN.unpack_from(buffer, HEADER_BYTES)
    return fh, offset, wanted


def parse_getxattr(buffer: Buffer, size: int) -> tuple[int, bytes]:
    """GETXATTR: (room for the value, 0 to ask for its size; name)."""
    if size < HEADER_BYTES + _GETXATTR_IN.size:
        raise _short("GETXATTR", size)
    room, _ = _GETXATTR_IN.unpack_from(buffer, HEADER_BYTES)
    return room, parse_name(buffer, size, HEADER_BYTES + _GETXATTR_IN.size)


def parse_listxattr(buffer: Buffer, size: int) -> int:
    """LISTXATTR: room for the list, 0 to ask for its size."""
    if size < HEADER_BYTES + _GETXATTR_IN.size:
        raise _short("LISTXATTR", size)
    room: int = _GETXATTR_IN.unpack_from(buffer, HEADER_BYTES)[0]
    return room


def parse_create(buffer: Buffer, size: int) -> tuple[int, int, bytes]:
    """CREATE: (open flags, mode, name)."""
    if size < HEADER_BYTES + _CREATE_IN.size:
        raise _short("CREATE", size)
    flags, mode, _, _ = _CREATE_IN.unpack_from(buffer, HEADER_BYTES)
    return flags, mode, parse_name(buffer, size, HEADER_BYTES + _CREATE_IN.size)


def parse_open(buffer: Buffer, size: int) -> int:
    """OPEN and OPENDIR: the open flags."""
    if size < HEADER_BYTES + _OPEN_IN.size:
        raise _short("OPEN", size)
    flags: int = _OPEN_IN.unpack_from(buffer, HEADER_BYTES)[0]
    return flags


def parse_release(buffer: Buffer, size: int) -> int:
    """RELEASE and RELEASEDIR: the file handle."""
    if size < HEADER_BYTES + _RELEASE_IN.size:
        raise _short("RELEASE", size)
    fh: int = _RELEASE_IN.unpack_from(buffer, HEADER_BYTES)[0]
    return fh


def parse_interrupt(buffer: Buffer, size: int) -> int:
    """INTERRUPT: the ``unique`` of the request whose caller got a signal."""
    if size < HEADER_BYTES + _INTERRUPT_IN.size:
        raise _short("INTERRUPT", size)
    unique: int = _INTERRUPT_IN.unpack_from(buffer, HEADER_BYTES)[0]
    return unique


def parse_forget(buffer: Buffer, size: int) -> int:
    """FORGET: how many lookups of the header's node are given back."""
    if size < HEADER_BYTES + _FORGET_IN.size:
        raise _short("FORGET", size)
    count: int = _FORGET_IN.unpack_from(buffer, HEADER_BYTES)[0]
    return count


def parse_batch_forget(buffer: Buffer, size: int) -> list[tuple[int, int]]:
    """BATCH_FORGET: (node, lookups given back) for each node."""
    start = HEADER_BYTES + _BATCH_FORGET_IN.size
    if size < start:
        raise _short("BATCH_FORGET", size)
    count, _ = _BATCH_FORGET_IN.unpack_from(buffer, HEADER_BYTES)
    if size < start + count * _FORGET_ONE.size:
        raise WireError(f"a BATCH_FORGET of {count} nodes in {size} bytes")
    end = start + count * _FORGET_ONE.size
    return list(_FORGET_ONE.iter_unpack(bytes(buffer[start:end])))
