"""A tar stream, entry by entry, with the exact bytes of every header.

Reads V7, USTAR, PAX and GNU archives (POSIX.1-2017 pax; GNU tar manual, "Basic
Tar Format") and judges doubtful ones as Go's ``archive/tar`` does, because that is
what containers/storage, Docker and containerd extract layers with:

* links, directories, devices and pipes have no payload, whatever size they announce;
* GNU long names win over PAX records; an empty PAX value means the header's own field;
* PAX global headers are checked for form and otherwise have no effect;
* sparse files are those of PAX archives (``gnusparse``); GNU's own type for them is refused;
* two blocks of zeros end the archive, and so does the end of the stream between entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final
from zlib import adler32

from layerstore import limits
from layerstore.errors import ContentError, InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats import gnusparse
from layerstore.formats.compression import Readable
from layerstore.formats.tarfields import is_zero, number, pax_integer, pax_records, pax_time, text

BLOCK: Final = 512

REGULAR: Final = b"0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
CHARACTER: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"
_KNOWN: Final = frozenset((REGULAR, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO))

_SKIP_BYTES: Final = 1 << 20
_XATTR: Final = b"SCHILY.xattr."


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One entry, and where it lies in the stream.

    ``headers`` are the exact bytes of all its header blocks, extended headers and their
    payloads included, from ``header_offset``; the payload of ``size`` bytes begins at
    ``header_offset + len(headers)``.  ``type`` is one of the constants of this module.
    Names and extended attributes are bytes as they stand in the archive.  Where ``sparse`` is
    given, the payload is the data of its pieces, and ``headers`` hold its map, too.
    """

    headers: bytes
    header_offset: int
    name: bytes
    type: bytes
    link_name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    dev_major: int
    dev_minor: int
    user_name: bytes
    group_name: bytes
    xattrs: dict[bytes, bytes]
    sparse: gnusparse.SparseMap | None = None

    @property
    def payload_offset(self) -> int:
        """Where in the stream the payload begins."""
        return self.header_offset + len(self.headers)

    @property
    def padding(self) -> int:
        """Bytes between the payload and the next header."""
        return -self.size % BLOCK


class TarReader:
    """Iterate over a tar stream; ``read`` gives the payload of the entry at hand.

    What is left of a payload when the next entry is asked for is skipped.

    Raises ``InvalidLayer`` for a broken archive, ``UnsupportedFormat`` for entry types that no
    container engine extracts and for sparse files, and ``LimitExceeded`` when the headers of
    one entry are larger than ``limits.TAR_EXTENDED_HEADER_BYTES``.  Who asks for ``sparse`` files
    gets them, and must look at ``TarEntry.sparse``.
    """

    def __init__(self, stream: Readable, *, offset: int = 0, sparse: bool = False) -> None:
        """Begin at the stream's present position, which counts as ``offset``."""
        self._stream = stream
        self._sparse = sparse
        self._position = offset
        self._payload = 0  # bytes of the payload not read yet
        self._padding = 0

    def __iter__(self) -> Iterator[TarEntry]:
        while (entry := self.next()) is not None:
            yield entry

    def read(self, n: int) -> bytes:
        """Return at most ``n`` bytes of the payload, ``b""`` only at its end."""
        wanted = min(n, self._payload)
        if wanted <= 0:
            return b""
        data = self._stream.read(wanted)
        if not data:
            raise InvalidLayer("the tar archive ends inside a file")
        self._payload -= len(data)
        self._position += len(data)
        return data

    def next(self) -> TarEntry | None:
        """Return the next entry, or None at the end of the archive."""
        while self._payload:
            self.read(_SKIP_BYTES)
        if self._padding:
            self._exactly(self._padding)
            self._padding = 0
        offset = self._position
        parts: list[bytes] = []
        total = 0
        records: dict[bytes, bytes] = {}
        long_name = long_link = None
        while True:
            block = self._header_block(pending=bool(parts))
            if block is None:
                return None
            parts.append(block)
            flag = block[156:157]
            if flag not in b"xgLK":
                break
            size = _size(block)
            total += BLOCK + size
            if total > limits.TAR_EXTENDED_HEADER_BYTES:
                raise LimitExceeded(
                    "the extended headers of one tar entry have more than "
                    f"{limits.TAR_EXTENDED_HEADER_BYTES} bytes"
                )
            payload = self._exactly(size)
            parts += (payload, self._exactly(-size % BLOCK))
            if flag == b"x":
                records = pax_records(payload)
            elif flag == b"g":
                pax_records(payload)
            elif flag == b"L":
                long_name = text(payload)
            else:
                long_link = text(payload)
        entry = _entry(
            block,
            b"".join(parts),
            offset,
            records=records,
            long_name=long_name,
            long_link=long_link,
        )
        if records and gnusparse.is_sparse(records):
            entry = self._with_map(entry, records)
        self._payload = entry.size
        self._padding = entry.padding
        return entry

    def _with_map(self, entry: TarEntry, records: dict[bytes, bytes]) -> TarEntry:
        name = records.get(gnusparse.NAME) or entry.name
        if not self._sparse:
            raise UnsupportedFormat(
                "sparse files in tar archives are extracted, and nothing else",
                subject=shown(name),
                advice="make the layer's archive without --sparse",
            )
        if entry.type != REGULAR:
            raise InvalidLayer("the entry is sparse and no file", subject=shown(name))
        parts = [entry.headers]

        def read_blocks(n: int) -> bytes:
            parts.append(self._exactly(n))
            return parts[-1]

        try:
            found, taken = gnusparse.read_map(records, entry.size, read_blocks)
        except ContentError as error:
            error.subject = shown(name)
            raise
        headers, size = b"".join(parts), entry.size - taken
        return replace(entry, headers=headers, name=name, size=size, sparse=found)

    def _header_block(self, *, pending: bool) -> bytes | None:
        block = self._up_to(BLOCK)
        if len(block) == BLOCK and not is_zero(block):
            _check_sum(block)
            return block
        if len(block) not in (0, BLOCK):
            raise InvalidLayer("the tar archive ends inside a header")
        if pending:
            raise InvalidLayer("the tar archive ends after an extended header")
        if block and not is_zero(self._up_to(BLOCK)):
            raise InvalidLayer("the tar archive has a block of zeros between two entries")
        return None

    def _up_to(self, n: int) -> bytes:
        """Return ``n`` bytes, fewer only at the end of the stream."""
        data = self._stream.read(n) if n else b""
        if 0 < len(data) < n:
            pieces = [data]
            got = len(data)
            while got < n and (data := self._stream.read(n - got)):
                pieces.append(data)
                got += len(data)
            data = b"".join(pieces)
        self._position += len(data)
        return data

    def _exactly(self, n: int) -> bytes:
        data = self._up_to(n)
        if len(data) != n:
            raise InvalidLayer("the tar archive is truncated")
        return data


def _check_sum(block: bytes) -> None:
    announced = number(block[148:156], "checksum")
    total = _sum(block) - sum(block[148:156]) + 8 * 0x20
    if announced != total:
        # Some old writers added up signed bytes.
        field = sum(byte > 127 for byte in block) - sum(byte > 127 for byte in block[148:156])
        if announced != total - 256 * field:
            raise InvalidLayer("a tar header has a wrong checksum")


def _sum(block: bytes) -> int:
    """``sum(block)``, for 512 bytes much faster.

    The low half of an Adler-32 (RFC 1950) is one more than the sum of the bytes modulo 65521, which
    those of half a block never reach.
    """
    half = BLOCK // 2
    return (adler32(block[:half]) & 0xFFFF) + (adler32(block[half:]) & 0xFFFF) - 2


def _size(block: bytes) -> int:
    size = number(block[124:136], "size")
    if size < 0:
        raise InvalidLayer("a tar header announces a negative size")
    return size


def _entry(
    block: bytes,
    headers: bytes,
    offset: int,
    *,
    records: dict[bytes, bytes],
    long_name: bytes | None,
    long_link: bytes | None,
) -> TarEntry:
    """Put the header block and its extended headers together."""
    flag = block[156:157]
    name = text(block[:100])
    link_name = text(block[157:257])
    user_name = group_name = b""
    dev_major = dev_minor = 0
    magic = block[257:265]
    if magic in (b"ustar\x0000", b"ustar  \0"):
        user_name, group_name = text(block[265:297]), text(block[297:329])
        if flag in (CHARACTER, BLOCK_DEVICE):
            dev_major = number(block[329:337], "device number")
            dev_minor = number(block[337:345], "device number")
        if block[345] and (prefix := _prefix(block)):
            name = prefix + b"/" + name
    size = _size(block)
    mtime_ns = number(block[136:148], "time") * 1_000_000_000
    uid, gid = number(block[108:116], "uid"), number(block[116:124], "gid")
    xattrs: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_XATTR):
            xattrs[key[len(_XATTR) :]] = value
        elif not value:
            continue
        elif key == b"path":
            name = value
        elif key == b"linkpath":
            link_name = value
        elif key == b"size":
            size = pax_integer(value, key)
            if size < 0:
                raise InvalidLayer("a PAX record announces a negative size")
        elif key == b"uid":
            uid = pax_integer(value, key)
        elif key == b"gid":
            gid = pax_integer(value, key)
        elif key == b"uname":
            user_name = value
        elif key == b"gname":
            group_name = value
        elif key == b"mtime":
            mtime_ns = pax_time(value)
    if long_name:
        name = long_name
    if long_link:
        link_name = long_link
    if flag in (b"\0", b"7"):
        # V7 has no type for directories; type 7, "contiguous", is a plain file everywhere.
        flag = DIRECTORY if flag == b"\0" and name.endswith(b"/") else REGULAR
    if flag == b"S":
        raise UnsupportedFormat(
            "sparse files of GNU's own tar format are not handled",
            subject=shown(name),
            advice="no container engine extracts them: make the archive with --format=pax",
        )
    if flag not in _KNOWN:
        raise UnsupportedFormat(
            f"the tar entry has the type {flag!r}, which is not handled", subject=shown(name)
        )
    if flag != REGULAR:
        size = 0
    elif size > limits.FILE_BYTES:
        raise LimitExceeded(f"a file in the tar archive announces {size} bytes")
    return TarEntry(
        headers=headers,
        header_offset=offset,
        name=name,
        type=flag,
        link_name=link_name if flag in (HARD_LINK, SYMLINK) else b"",
        mode=number(block[100:108], "mode"),
        uid=uid,
        gid=gid,
        size=size,
        mtime_ns=mtime_ns,
        dev_major=dev_major,
        dev_minor=dev_minor,
        user_name=user_name,
        group_name=group_name,
        xattrs=xattrs,
    )


def shown(name: bytes) -> str:
    """A name of an archive for a message."""
    return name[:256].decode(errors="replace")


def _prefix(block: bytes) -> bytes:
    """Return the part of a long name that stands in the second name field, if it does."""
    if block[257:265] == b"ustar\x0000":
        # The star variant keeps times behind a shorter prefix.
        return text(block[345:476] if block[508:512] == b"tar\0" else block[345:500])
    # GNU archives have times there.  Writers in Go before 1.8 put a prefix nevertheless.
    prefix = text(block[345:500])
    numeric = block[345] & 0x80 or not block[345:357].strip(b" \0").strip(b"01234567")
    return prefix if not numeric and prefix.isascii() else b""
