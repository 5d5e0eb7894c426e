"""The compressed blob of a layer as a sparse file that fills up.

The blob is cut into *units*: the head (bytes before the first member that
the TOC names), each member, and the tail (TOC and footer).  Units tile the blob
without gaps.  What the registry sent is kept as it came, so that no byte is
fetched twice and the whole blob, once complete, can be exported byte for byte.
Nothing here is verified: whoever takes a member out checks its chunks, and
whoever exports the blob checks its digest.

While the disk takes nothing, units that somebody waits for are *held*: they lie on the
`Shelf` for a while.  Such a unit is not present: no bit ever stands for bytes that were not
written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from layerstore import limits
from layerstore.content.bitmap import Bitmap
from layerstore.content.disk import Disk
from layerstore.content.files import OpenFile, open_to_fill, write_all
from layerstore.content.room import Room
from layerstore.content.shelf import Shelf
from layerstore.errors import DiskFull, StorageError


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


class Cache(Protocol):
    """What the blobs of all layers share (see ObjectStore)."""

    @property
    def disk(self) -> Disk: ...
    @property
    def shelf(self) -> Shelf: ...
    @property
    def room(self) -> Room: ...


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
    """The sparse file ``path`` of a blob of ``size`` bytes, with its bitmap of units.

    Methods raise StorageError when the disk fails, DiskFull when it takes nothing.
    """

    def __init__(
        self,
        path: Path,
        table: MemberTable,
        size: int,
        toc_offset: int,
        cache: Cache,
    ) -> None:
        self.path = path
        self.size = size
        self.disk, self.shelf, self._room = cache.disk, cache.shelf, cache.room
        self._table = table
        self._toc_offset = toc_offset
        self.units = table.members + 2
        try:
            self._open(path, path.with_name(path.name + ".map"))
        except OSError as error:
            self.disk.failed(error, "cannot open", path)
            self._open_stand_in()
        flags = fcntl.fcntl(self.file.fd, fcntl.F_GETFL)
        self.provisional = self._stands_in or flags & os.O_ACCMODE == os.O_RDONLY
        """Nothing can be stored in it: it is to be opened anew when the disk takes writes again."""
        for unit in (0, self.units - 1):
            offset, end = self.extent(unit)
            if offset == end:
                with contextlib.suppress(StorageError):  # on a disk that takes nothing
                    self.present.set(unit)
        self.stored_bytes = self._count_stored()

    def _open(self, path: Path, map_path: Path) -> None:
        self._stands_in = False
        self.file = OpenFile(open_to_fill(path))
        if os.fstat(self.file.fd).st_size != self.size:
            map_path.unlink(missing_ok=True)  # first: no bit may outlive its bytes
            os.ftruncate(self.file.fd, self.size)
        self.present = Bitmap(map_path, self.units, self.disk)

    def _open_stand_in(self) -> None:
        """An empty file of no size on any disk, for one that cannot be made."""
        self.file = OpenFile(os.memfd_create("blob"))
        bits = OpenFile(os.memfd_create("bits"))
        self.present = Bitmap(Path(f"/proc/self/fd/{bits.fd}"), self.units, self.disk)
        self._stands_in = True

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

    def too_long(self, unit: int) -> bool:
        """Whether the unit has too many bytes to be held."""
        offset, end = self.extent(unit)
        return end - offset > limits.HELD_UNIT_BYTES

    def is_member(self, unit: int) -> bool:
        """Whether the unit is a member with file contents (not head or tail)."""
        return 0 < unit < self.units - 1

    def write(self, offset: int, data: bytes | memoryview, *, ahead: bool = False) -> None:
        """Put bytes in their place; mark() says that a unit has all of its bytes.

        ``ahead`` says that nobody waits for them.  Raises NoRoom if the limits do not
        allow them.
        """
        self.disk.check()
        if self.provisional:
            raise DiskFull("the disk took nothing when the layer was opened")
        view = memoryview(data)
        self._room.charge(len(view), ahead=ahead)
        try:
            write_all(self.file.fd, view, offset)
        except OSError as error:
            raise self.disk.failed(error, "cannot write", self.path) from error

    def seed(self, end: bytes) -> None:
        """Take over the last bytes of the blob.

        Raises StorageError if the disk does not take them; they are held in memory then.
        """
        start = self.size - len(end)
        view = memoryview(end)
        for unit in range(self.units - 1, -1, -1):
            offset, stop = self.extent(unit)
            if offset < start:
                return
            if self.present[unit]:
                continue
            data = view[offset - start : stop - start]
            try:
                self.write(offset, data)
                self.mark(unit)
            except StorageError:
                if not self.too_long(unit):
                    self.hold(unit, data)
                raise

    def mark(self, unit: int) -> None:
        """All bytes of the unit are written."""
        if self.present.set(unit):
            offset, end = self.extent(unit)
            self.stored_bytes += end - offset

    def discard(self, unit: int) -> None:
        """The bytes of the unit are wrong, or cannot be read: forget them."""
        self.shelf.drop((self.path, unit))
        if self.present.unset(unit):
            offset, end = self.extent(unit)
            self.stored_bytes -= end - offset

    def hold(self, unit: int, data: bytes | memoryview) -> None:
        """Keep the bytes of a unit, which the disk did not take, in memory for a while."""
        self.shelf.put((self.path, unit), data)

    def held(self, unit: int) -> bytes | None:
        """The bytes of a unit that is held."""
        return self.shelf.get((self.path, unit))

    def here(self, unit: int) -> bool:
        """Whether the unit is present, or held."""
        return self.present[unit] or (self.path, unit) in self.shelf

    def store_held(self) -> None:
        """Write what is held of this blob, now that the disk takes it."""
        for unit in self.shelf.units(self.path):
            data = self.held(unit)
            if data is not None and not self.present[unit]:
                self.write(self.extent(unit)[0], data)
                self.mark(unit)
            self.shelf.drop((self.path, unit))

    def read_unit(self, unit: int) -> bytes:
        """The stored bytes of a unit that is present."""
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
            # The error is told once, and what was not written may lie in memory still, as if
            # it were: from now on it is read from the disk.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            raise self.disk.failed(error, "cannot sync", self.path) from error
        self.present.sync()

    def sha256(self, progress: Callable[[int], None] = lambda _: None) -> str:
        """Hex SHA-256 over the whole file; ``progress`` is told numbers of bytes.

        Raises OSError if it cannot be read.
        """
        hasher = hashlib.sha256()
        offset = 0
        while piece := os.pread(self.file.fd, limits.MIB, offset):
            hasher.update(piece)
            offset += len(piece)
            progress(len(piece))
        return hasher.hexdigest()
