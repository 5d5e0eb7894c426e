"""Points from which a gzip stream can be decompressed without what lies before.

A deflate block refers to the 32 KiB before it, so a *checkpoint* is the place where a block
begins and those 32 KiB; at the beginning of a gzip member nothing is needed.  With one every
few MiB, a file out of the middle of an ordinary layer costs one range request instead of the
whole blob (the idea is that of zlib's example ``zran.c``).

Only blocks that begin on a whole byte are taken, about one in eight: then the ranges between
checkpoints are members like any others, which no two share a byte of.

The file: header, table, windows, checksum; numbers are little-endian::

    magic, version, points
    per point: offset in the blob, offset in the tar stream, where its window is, its length
    windows, each compressed with zlib; length 0: a gzip member begins here
    BLAKE2b over all that stands before it
"""

from __future__ import annotations

import hashlib
import io
import mmap
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidLayer, StorageError
from layerstore.formats.compression import Readable
from layerstore.formats.inflate import Inflater

_MAGIC: Final = b"lscheck\0"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIQ")
_POINT: Final = struct.Struct("<QQQI")
_CHECKSUM_BYTES: Final = 32
_INPUT_BYTES: Final = 256 * limits.KIB
_OUTPUT_BYTES: Final = 512 * limits.KIB
_RAW_WBITS: Final = -15
_GZIP_WBITS: Final = 31
_GZIP_TRAILER_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A place in a gzip stream: bytes of the blob and of the tar stream that lie before it.

    ``window`` is compressed; empty where a gzip member begins.
    """

    offset: int
    plain_offset: int
    window: bytes


class CheckpointReader:
    """The plain stream inside gzip ``source``; collects ``points`` about every ``spacing`` bytes.

    All points that lie before the end of what was read are known by then; the first is at 0.
    ``read`` raises InvalidLayer for corrupt or truncated data and what ``source`` raises.
    """

    def __init__(self, source: Readable, spacing: int) -> None:
        self._source = source
        self._spacing = spacing
        self._inflater = Inflater(_OUTPUT_BYTES)
        self._ended = False
        self._left = b""
        self.points: list[Checkpoint] = [Checkpoint(0, 0, b"")]

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes, ``b""`` only at the end."""
        if not self._left:
            self._left = self._fill()
        data, self._left = self._left[:n], self._left[n:]
        return data

    def _fill(self) -> bytes:
        inflater = self._inflater
        while not self._ended and not inflater.full:
            if inflater.hungry:
                data = self._source.read(_INPUT_BYTES)
                if not data:
                    if not inflater.at_member or not inflater.consumed:
                        raise InvalidLayer("the gzip stream is truncated")
                    self._ended = True
                    break
                inflater.feed(data)
            inflater.step()
            if (inflater.at_block or inflater.at_member) and inflater.produced - self.points[
                -1
            ].plain_offset >= self._spacing:
                window = b"" if inflater.at_member else zlib.compress(inflater.window(), 1)
                self.points.append(Checkpoint(inflater.consumed, inflater.produced, window))
        return inflater.take()


def write_checkpoints(points: list[Checkpoint], path: Path) -> None:
    """Write the file.  Raises StorageError."""
    at = _HEADER.size + len(points) * _POINT.size
    table = bytearray(_HEADER.pack(_MAGIC, _VERSION, len(points)))
    for point in points:
        table += _POINT.pack(point.offset, point.plain_offset, at, len(point.window))
        at += len(point.window)
    running = _checksum()
    try:
        with path.open("wb") as out:
            for data in (bytes(table), *(point.window for point in points)):
                running.update(data)
                out.write(data)
            out.write(running.digest())
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror}", subject=str(path)) from error


class Checkpoints:
    """A file of checkpoints, mapped; takes members apart as a ``MemberCodec``.  Thread-safe.

    ``member_offset`` gives the offset in the blob at which a member begins.
    """

    def __init__(self, data: bytes | mmap.mmap, member_offset: Callable[[int], int]) -> None:
        """Raises StorageError if ``data``, a whole file, is not intact."""
        self._data = data
        self._member_offset = member_offset
        if len(data) < _HEADER.size + _CHECKSUM_BYTES:
            raise StorageError("a file of checkpoints is cut off")
        magic, version, count = _HEADER.unpack_from(data)
        running = _checksum()
        with memoryview(data) as view:
            running.update(view[:-_CHECKSUM_BYTES])
            intact = running.digest() == bytes(view[-_CHECKSUM_BYTES:])
        if (magic, version) != (_MAGIC, _VERSION) or not intact:
            raise StorageError("a file of checkpoints is damaged")
        self._count = count

    @classmethod
    def open(cls, path: Path, member_offset: Callable[[int], int]) -> Checkpoints:
        """Map a file; StorageError if it is missing or not intact."""
        try:
            with path.open("rb") as stream:
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise StorageError(f"cannot map: {error}", subject=str(path)) from error
        try:
            return cls(data, member_offset)
        except StorageError as error:
            error.subject = str(path)
            raise

    def decompress(self, member: int, data: bytes | memoryview, *, needed: int) -> bytes:
        """See ``MemberCodec``."""
        stream = self.stream(member, io.BytesIO(data))
        pieces = []
        missing = needed
        while missing:
            plain = stream.read(missing)
            if not plain:
                raise InvalidLayer(f"{len(data)} bytes of a gzip stream are too few")
            pieces.append(plain)
            missing -= len(plain)
        return b"".join(pieces)

    def stream(self, member: int, source: Readable) -> _Span:
        """See ``MemberCodec``."""
        return _Span(source, self._window(self._member_offset(member)))

    def _window(self, offset: int) -> bytes:
        number = bisect_right(range(self._count), offset, key=self._offset) - 1
        at, _, start, length = _POINT.unpack_from(self._data, _HEADER.size + number * _POINT.size)
        if at != offset:
            raise StorageError("no checkpoint is kept for a member of the index")
        return zlib.decompress(self._data[start : start + length]) if length else b""

    def _offset(self, number: int) -> int:
        return int(_POINT.unpack_from(self._data, _HEADER.size + number * _POINT.size)[0])


class _Span:
    """The plain stream from a checkpoint on, through any number of gzip members."""

    def __init__(self, source: Readable, window: bytes) -> None:
        self._source = source
        self._raw = bool(window)
        self._stream = (
            zlib.decompressobj(_RAW_WBITS, zdict=window)
            if window
            else zlib.decompressobj(_GZIP_WBITS)
        )

    def read(self, n: int, /) -> bytes:
        try:
            while True:
                data = self._stream.unconsumed_tail
                if self._stream.eof:
                    data = self._next_member()
                    if not data:
                        return b""
                elif not data:
                    data = self._source.read(_INPUT_BYTES)
                plain = self._stream.decompress(data, n)
                if plain:
                    return plain
                if not data:
                    return b""
        except zlib.error as error:
            raise InvalidLayer(f"the gzip stream is corrupt: {error}") from None

    def _next_member(self) -> bytes:
        rest = self._stream.unused_data
        trailer = _GZIP_TRAILER_BYTES if self._raw else 0
        while len(rest) <= trailer and (more := self._source.read(_INPUT_BYTES)):
            rest += more
        self._raw = False
        self._stream = zlib.decompressobj(_GZIP_WBITS)
        return rest[trailer:]


def _checksum() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_CHECKSUM_BYTES, person=b"checkpoints")
