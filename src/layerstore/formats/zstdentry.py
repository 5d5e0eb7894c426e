"""From a tar entry to its entry in the TOC of a zstd:chunked layer.

The fields are those of containers/storage (pkg/chunked/internal/minimal), which compares each
with what Go's ``archive/tar`` reads from the header in the tar-split.  So they hold what Go
reads, not what is sensible: times of 1970, mode bits beyond the permissions.
"""

from __future__ import annotations

from typing import Final

import msgspec

from layerstore.errors import InvalidLayer
from layerstore.formats import tarstream
from layerstore.formats.tarfields import number, pax_records, pax_time
from layerstore.formats.tarstream import BLOCK, TarEntry
from layerstore.formats.tocentry import ENTRY_TYPES, json_name, rfc3339, toc_xattrs

_GNU: Final = b"ustar  \0"
_LINKS: Final = (tarstream.HARD_LINK, tarstream.SYMLINK)
_DEVICES: Final = (tarstream.CHARACTER, tarstream.BLOCK_DEVICE)
_EPOCH: Final = "1970-01-01T00:00:00Z"
_NANO: Final = 1_000_000_000


class ZstdEntry(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True, gc=False):
    """One entry, field for field and in the order of containers/storage.

    ``offset`` and ``end_offset`` bound the frames of a file in the blob; the ``chunk`` fields
    are set in files of more than one chunk only.  ``name_raw`` and ``link_name_raw`` are
    layerstore's own, see ``formats.toc``.
    """

    type: str
    name: str
    link_name: str = ""
    mode: int = 0
    size: int = 0
    uid: int = 0
    gid: int = 0
    modtime: str = ""
    accesstime: str = ""
    changetime: str = ""
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, str] | None = None
    digest: str = ""
    offset: int = 0
    end_offset: int = 0
    chunk_size: int = 0
    chunk_offset: int = 0
    chunk_digest: str = ""
    chunk_type: str = ""
    name_raw: str = ""
    link_name_raw: str = ""


def zstd_entry(entry: TarEntry) -> ZstdEntry:
    """Return the TOC entry of ``entry`` without what concerns the payload's place and digest.

    Raises ``UnsupportedFormat`` for an extended attribute whose name JSON cannot hold.
    """
    name, name_raw = json_name(entry.name)
    link_name, link_name_raw = json_name(entry.link_name)
    accessed, changed = _more_times(entry)
    return ZstdEntry(
        type=ENTRY_TYPES[entry.type],
        name=name,
        link_name=link_name,
        mode=entry.mode,
        size=entry.size,
        uid=entry.uid,
        gid=entry.gid,
        modtime=_time(entry.mtime_ns),
        accesstime="" if accessed is None else _time(accessed),
        changetime="" if changed is None else _time(changed),
        dev_major=entry.dev_major,
        dev_minor=entry.dev_minor,
        xattrs=toc_xattrs(entry.xattrs) if entry.xattrs else None,
        name_raw=name_raw,
        link_name_raw=link_name_raw,
    )


def go_reads_the_same(entry: TarEntry) -> bool:
    """Whether containers/storage finds in the headers what ``zstd_entry`` tells.

    It may say no where it would: for archives that hardly anybody writes.
    """
    block = entry.headers[-BLOCK:]
    flag = block[156:157]
    if flag == b"7" or _has_global_header(entry.headers):
        return False
    if json_name(entry.name)[1] or json_name(entry.link_name)[1]:
        return False
    if not _time(entry.mtime_ns) or entry.mode < 0 or entry.uid < 0 or entry.gid < 0:
        return False
    if entry.type not in _LINKS and block[157:158] != b"\0":
        return False
    if entry.type not in _DEVICES and _devices(block):
        return False
    return entry.type == tarstream.REGULAR or not number(block[124:136], "size")


def _has_global_header(headers: bytes) -> bool:
    position = 0
    while position < len(headers) - BLOCK:
        if headers[position + 156 : position + 157] == b"g":
            return True
        size = number(headers[position + 124 : position + 136], "size")
        position += BLOCK + size + -size % BLOCK
    return False


def _devices(block: bytes) -> bool:
    if block[257:263] not in (b"ustar\0", b"ustar "):
        return False
    return any(bytes(field).strip(b" \x000") for field in (block[329:337], block[337:345]))


def _more_times(entry: TarEntry) -> tuple[int | None, int | None]:
    """Times of last access and change, where the headers have them."""
    block = entry.headers[-BLOCK:]
    found: list[int | None] = [None, None]
    if block[257:265] == _GNU:
        for which, field in enumerate((block[345:357], block[357:369])):
            if field[:1] != b"\0":
                try:
                    found[which] = number(field, "time") * _NANO
                except InvalidLayer:
                    break  # a prefix of the name, as old writers in Go put it there
    if len(entry.headers) > BLOCK:
        records = _records(entry.headers)
        for which, key in enumerate((b"atime", b"ctime")):
            if value := records.get(key):
                found[which] = pax_time(value)
    return found[0], found[1]


def _records(headers: bytes) -> dict[bytes, bytes]:
    """The PAX records that count for the entry."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(headers) - BLOCK:
        size = number(headers[position + 124 : position + 136], "size")
        start = position + BLOCK
        if headers[position + 156 : position + 157] == b"x":
            records = pax_records(headers[start : start + size])
        position = start + size + -size % BLOCK
    return records


def _time(nanoseconds: int) -> str:
    """As ``rfc3339``, but 1970 is a time like others."""
    return rfc3339(nanoseconds) if nanoseconds else _EPOCH
