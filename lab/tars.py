"""A tar writer that can express every entry a layer may hold, well formed or odd.

`tarfile` of the standard library cleans names, sorts out duplicates of directories and speaks
text; layers in the field carry raw bytes.  Here a `Member` says exactly what stands in the header.
Header layouts: POSIX.1-1988 (USTAR: name 100, prefix 155), POSIX.1-2001 (PAX records) and GNU
(types `L`, `K`; base-256 numbers).  Whiteouts follow the OCI image specification (layer.md).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

REGULAR: Final = b"0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
CHARACTER: Final = b"3"
BLOCK: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"

WHITEOUT_PREFIX: Final = b".wh."
OPAQUE_MARKER: Final = b".wh..wh..opq"
XATTR_RECORD: Final = b"SCHILY.xattr."

MTIME_NS: Final = 1_700_000_000 * 10**9
"""The time of members that do not say another (2023-11-14)."""

_BLOCK: Final = 512
_ZEROS: Final = bytes(1 << 20)
_NS: Final = 10**9

Form = Literal["pax", "gnu"]
"""What carries long names and great numbers: PAX records, or GNU `L`/`K` entries and base-256.

The GNU form has no place for extended attributes and fractions of a second.
"""


@dataclass(frozen=True, slots=True)
class Zeros:
    """Content of `size` zero bytes that is never held in memory."""

    size: int


Content = bytes | Path | Zeros


@dataclass(frozen=True, slots=True)
class Member:
    """One archive entry.  `name` is written as it stands; directories end in `/` by custom."""

    name: bytes
    kind: bytes = REGULAR
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    user: bytes = b""
    group: bytes = b""
    mtime_ns: int = MTIME_NS
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)
    content: Content = b""
    form: Form = "pax"

    @property
    def size(self) -> int:
        """Bytes of content."""
        match self.content:
            case bytes() as data:
                return len(data)
            case Zeros(size):
                return size
            case path:
                return path.stat().st_size


def directory(name: bytes, mode: int = 0o755, **more: Any) -> Member:
    """A directory entry; the trailing slash is added."""
    return _member(name.rstrip(b"/") + b"/", DIRECTORY, mode, more)


def regular(name: bytes, content: Content = b"", mode: int = 0o644, **more: Any) -> Member:
    """A regular file entry."""
    return _member(name, REGULAR, mode, {"content": content, **more})


def symlink(name: bytes, target: bytes, **more: Any) -> Member:
    """A symbolic link entry."""
    return _member(name, SYMLINK, 0o777, {"link": target, **more})


def hard_link(name: bytes, target: bytes | Member, **more: Any) -> Member:
    """A further name of `target`, which is a name or a member of the same archive.

    A member's mode, owner and time are repeated, as archivers do: extraction sets them again, so
    other ones would change the file under all its names.
    """
    if isinstance(target, Member):
        same = {"mode": target.mode, "uid": target.uid, "gid": target.gid}
        more = {**same, "mtime_ns": target.mtime_ns, "link": target.name, **more}
    else:
        more = {"link": target, **more}
    return _member(name, HARD_LINK, 0o644, more)


def whiteout(name: bytes, **more: Any) -> Member:
    """The marker that deletes `name` of the layers below."""
    parent, slash, last = name.rpartition(b"/")
    return regular(parent + slash + WHITEOUT_PREFIX + last, mode=0, **more)


def opaque(name: bytes, **more: Any) -> Member:
    """The marker that hides everything the layers below hold in directory `name`."""
    return regular(name.rstrip(b"/") + b"/" + OPAQUE_MARKER, mode=0, **more)


def write_tar(out: BinaryIO, members: Iterable[Member]) -> int:
    """Write the archive with its two closing zero blocks; gives its length in bytes."""
    total = 0
    for member in members:
        for piece in encode(member):
            out.write(piece)
            total += len(piece)
    out.write(bytes(2 * _BLOCK))
    return total + 2 * _BLOCK


def encode(member: Member) -> Iterator[bytes]:
    """The bytes of one entry: extension headers, header, content and padding."""
    yield from _headers(member)
    remaining = member.size
    padding = -remaining % _BLOCK
    match member.content:
        case bytes() as data:
            yield data
        case Zeros():
            while remaining:
                piece = _ZEROS[: min(remaining, len(_ZEROS))]
                yield piece
                remaining -= len(piece)
        case path:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    yield block
    yield bytes(padding)


def _member(name: bytes, kind: bytes, mode: int, more: Mapping[str, Any]) -> Member:
    """`replace` checks the field names of `more`."""
    return replace(Member(name=name, kind=kind, mode=mode), **more)


def _headers(member: Member) -> Iterator[bytes]:
    if member.form == "pax":
        records = _pax_records(member)
        if records:
            yield _extension(b"x", b"PaxHeaders/" + member.name[-80:], records)
    else:
        if len(member.name) > 100:
            yield _extension(b"L", b"././@LongLink", member.name + b"\0")
        if len(member.link) > 100:
            yield _extension(b"K", b"././@LongLink", member.link + b"\0")
    yield _header(member, member.kind, member.size)


def _pax_records(member: Member) -> bytes:
    records: dict[bytes, bytes] = {}
    if _split(member.name) is None:
        records[b"path"] = member.name
    if len(member.link) > 100:
        records[b"linkpath"] = member.link
    if member.mtime_ns % _NS or not 0 <= member.mtime_ns // _NS < 8**11:
        records[b"mtime"] = _decimal_time(member.mtime_ns)
    for key, value in ((b"uid", member.uid), (b"gid", member.gid)):
        if value >= 8**7:
            records[key] = b"%d" % value
    if member.size >= 8**11:
        records[b"size"] = b"%d" % member.size
    for xattr, data in sorted(member.xattrs.items()):
        records[XATTR_RECORD + xattr] = data
    return b"".join(_record(key, value) for key, value in records.items())


def _decimal_time(mtime_ns: int) -> bytes:
    sign = b"-" if mtime_ns < 0 else b""
    seconds, fraction = divmod(abs(mtime_ns), _NS)
    return sign + (b"%d.%09d" % (seconds, fraction)).rstrip(b"0").rstrip(b".")


def _record(key: bytes, value: bytes) -> bytes:
    """`LENGTH key=value\\n`, where LENGTH counts its own digits."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


def _extension(kind: bytes, name: bytes, payload: bytes) -> bytes:
    header = _header(Member(name=name[:100], mtime_ns=0), kind, len(payload))
    return header + payload + bytes(-len(payload) % _BLOCK)


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """The USTAR (prefix, name) fields, or None when the name does not fit."""
    if len(name) <= 100:
        return b"", name
    cut = name.rfind(b"/", 0, min(156, len(name) - 1))
    if cut <= 0 or len(name) - cut - 1 > 100:
        return None
    return name[:cut], name[cut + 1 :]


def _header(member: Member, kind: bytes, size: int) -> bytes:
    gnu = member.form != "pax"
    prefix, name = (b"", member.name[:100]) if gnu else (_split(member.name) or (b"", b""))
    if not name:
        name = member.name[:100]
    seconds = member.mtime_ns // _NS
    raw = b"".join(
        (
            name.ljust(100, b"\0"),
            _number(member.mode, 8, gnu),
            _number(member.uid, 8, gnu),
            _number(member.gid, 8, gnu),
            _number(size, 12, gnu),
            _number(seconds, 12, gnu),
            b" " * 8,
            kind,
            member.link[:100].ljust(100, b"\0"),
            b"ustar  \0" if gnu else b"ustar\00000",
            member.user.ljust(32, b"\0"),
            member.group.ljust(32, b"\0"),
            _number(member.device[0], 8, gnu),
            _number(member.device[1], 8, gnu),
            prefix.ljust(155, b"\0"),
            bytes(12),
        )
    )
    checksum = b"%06o\0 " % sum(raw)
    return raw[:148] + checksum + raw[156:]


def _number(value: int, width: int, gnu: bool) -> bytes:
    """Octal text; what does not fit is base-256 in GNU form and 0 in PAX form (a record has it)."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    if not gnu:
        return b"0" * (width - 1) + b"\0"
    raw = (value % (1 << (8 * width))).to_bytes(width, "big")
    return (b"\x80" if value >= 0 else b"\xff") + raw[1:]
