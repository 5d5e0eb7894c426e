"""Writing the header of a tar entry: USTAR, with a PAX extended header for what does not fit.

The form is POSIX.1-2017 pax; extended attributes are ``SCHILY.xattr.NAME`` records, as GNU tar,
Go's ``archive/tar`` and every container engine write and read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from layerstore.formats.tarstream import BLOCK

_OCTAL7: Final = 8**7
_OCTAL11: Final = 8**11


def tar_header(
    name: bytes,
    kind: bytes,
    *,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    link_name: bytes = b"",
    device: tuple[int, int] = (0, 0),
    xattrs: Mapping[bytes, bytes] | None = None,
) -> bytes:
    """All header blocks of one entry.

    ``kind`` is one of the constants of ``tarstream``, ``mtime`` in seconds since 1970, ``device``
    major and minor number.  Payload and padding are the caller's to add.
    """
    records: dict[bytes, bytes] = {}
    prefix, short = _split(name)
    if not short:
        records[b"path"] = name
    if len(link_name) > 100:
        records[b"linkpath"] = link_name
    if size >= _OCTAL11:
        records[b"size"] = b"%d" % size
    if uid >= _OCTAL7:
        records[b"uid"] = b"%d" % uid
    if gid >= _OCTAL7:
        records[b"gid"] = b"%d" % gid
    if not 0 <= mtime < _OCTAL11:
        records[b"mtime"] = b"%d" % mtime
    for key in sorted(xattrs or {}):
        records[b"SCHILY.xattr." + key] = (xattrs or {})[key]
    extended = b""
    if records:
        payload = b"".join(_record(key, value) for key, value in records.items())
        extended = (
            _block(b"PaxHeaders/" + name[-80:].lstrip(b"/"), b"x", mode=0o644, size=len(payload))
            + payload
            + bytes(-len(payload) % BLOCK)
        )
    return extended + _block(
        short or name[:100],
        kind,
        prefix=prefix,
        mode=mode,
        uid=uid if uid < _OCTAL7 else 0,
        gid=gid if gid < _OCTAL7 else 0,
        size=size if size < _OCTAL11 else 0,
        mtime=mtime if 0 <= mtime < _OCTAL11 else 0,
        link_name=link_name[:100],
        device=device,
    )


def _block(
    name: bytes,
    kind: bytes,
    *,
    mode: int,
    size: int,
    prefix: bytes = b"",
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link_name: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    raw = b"".join(
        (
            name.ljust(100, b"\0"),
            b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode & 0o7777, uid, gid, size, mtime),
            b" " * 8,
            kind,
            link_name.ljust(100, b"\0"),
            b"ustar\x0000",
            bytes(64),  # user and group names
            b"%07o\0%07o\0" % device,
            prefix.ljust(155, b"\0"),
            bytes(12),
        )
    )
    return raw[:148] + b"%06o\0 " % sum(raw) + raw[156:]


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def _split(name: bytes) -> tuple[bytes, bytes]:
    """The name in USTAR's two fields, prefix first; both empty when it does not fit."""
    if len(name) <= 100 and name.isascii():
        return b"", name
    cut = name.rfind(b"/", 0, min(156, len(name) - 1))
    if cut <= 0 or len(name) - cut - 1 > 100 or not name.isascii():
        return b"", b""
    return name[:cut], name[cut + 1 :]
