"""The compressed blob of a layer as a sparse file that fills up.

The blob is cut into *units*: the head (bytes before the first member that
the TOC names), each member, and the tail (TOC and footer).  Units tile the blob
without gaps.  What the registry sent is kept as it came, so that no byte is
fetched twice and the whole blob, once complete, can be exported byte for byte.
Nothing here is verified: whoever takes a member out checks its chunks, and
whoever exports the blob checks its digest.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

from layerstore import limits
from layerstore.content.bitmap import Bitmap
from layerstore.content.files import OpenFile
from layerstore.errors import StorageError


class Member(Protocol):
    """A compressed byte range [offset, end) of the blob."""

    @property
    def offset(self) -> int: ...
    @property
    def end(self) -> int: ...


class MemberTable(Protocol):
    """What cutting a blob into units needs to know of a layer."""

    @property
    def members(self) -> int: ...
    def member(self, number: int) -> Member: ...


class Range:
    """A stream over the bytes [offset, end) of a file."""

    def __init__(self, file: OpenFile, offset: int, end: int) -> None:
        self._file = file
        self._offset = offset
        self._end = end

    def read(self, n: int, /) -> bytes:
        """At most ``n`` bytes, b"" at the end."""
        data = self._file.read(self._offset, min(n, self._end - self._offset))
        self._offset += len(data)
        return data


class BlobFile:
    """The sparse file ``path`` of a blob of ``size`` bytes, with its bitmap of units."""

    def __init__(self, path: Path, table: MemberTable, size: int, toc_offset: int) -> None:
        self.path = path
        self.size = size
        self._table = table
        self._toc_offset = toc_offset
        self.units = table.members + 2
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.file = OpenFile(fd)
            map_path = path.with_name(path.name + ".map")
            if os.fstat(fd).st_size != size:
                map_path.unlink(missing_ok=True)  # first: no bit may outlive its bytes
                os.ftruncate(fd, size)
        except OSError as error:
            raise StorageError(f"cannot open: {error.strerror}", subject=str(path)) from error
        self.present = Bitmap(map_path, self.units)
        for unit in (0, self.units - 1):
            offset, end = self.extent(unit)
            if offset == end:
                self.present.set(unit)
        self.stored_bytes = self._count_stored()

    def _count_stored(self) -> int:
        if self.present.full:
            return self.size
        extents = (self.extent(unit) for unit in range(self.units) if self.present[unit])
        return sum(end - offset for offset, end in extents)

    def extent(self, unit: int) -> tuple[int, int]:
        """The byte range [offset, end) of a unit."""
        members = self._table.members
        if unit == 0:
            return 0, self._table.member(0).offset if members else self._toc_offset
        if unit == members + 1:
            return self._toc_offset, self.size
        member = self._table.member(unit - 1)
        return member.offset, member.end

    def is_member(self, unit: int) -> bool:
        """Whether the unit is a member with file contents (not head or tail)."""
        return 0 < unit < self.units - 1

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes in their place; mark() says that a unit has all of its bytes."""
        view = memoryview(data)
        end = offset + len(view)
        while view:
            try:
                written = os.pwrite(self.file.fd, view, end - len(view))
            except OSError as error:
                raise StorageError(
                    f"cannot write: {error.strerror}", subject=str(self.path)
                ) from error
            view = view[written:]

    def mark(self, unit: int) -> None:
        """All bytes of the unit are written."""
        if self.present.set(unit):
            offset, end = self.extent(unit)
            self.stored_bytes += end - offset

    def discard(self, unit: int) -> None:
        """The bytes of the unit are wrong: forget them."""
        if self.present.unset(unit):
            offset, end = self.extent(unit)
            self.stored_bytes -= end - offset

    def read_unit(self, unit: int) -> bytes:
        """The stored bytes of a unit."""
        offset, end = self.extent(unit)
        return self.file.read(offset, end - offset)

    def stream_unit(self, unit: int) -> Range:
        """The stored bytes of a unit, piece by piece."""
        return Range(self.file, *self.extent(unit))

    def sync(self) -> None:
        """Wait until the disk has the bytes, then what says that they are there."""
        try:
            os.fdatasync(self.file.fd)
        except OSError as error:
            raise StorageError(f"cannot sync: {error.strerror}", subject=str(self.path)) from error
        self.present.sync()

    def sha256(self) -> str:
        """Hex SHA-256 over the whole file."""
        hasher = hashlib.sha256()
        offset = 0
        while piece := os.pread(self.file.fd, limits.MIB, offset):
            hasher.update(piece)
            offset += len(piece)
        return hasher.hexdigest()
