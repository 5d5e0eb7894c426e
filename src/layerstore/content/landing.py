"""Where the bytes of one response go: into the blob file, or else into memory.

The file gets them as they come.  What it does not take is gathered unit by unit, and each
unit is held as soon as it is whole; what had been written of it by then is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from layerstore.content.blob import BlobFile
from layerstore.errors import DiskFull, StorageError


class Landing:
    """The bytes of consecutive units of ``blob``.  A context manager, for one thread.

    ``ahead`` says whether nobody waits for them.
    Methods raise StorageError where the bytes can be put nowhere.
    """

    def __init__(self, blob: BlobFile, ahead: Callable[[], bool]) -> None:
        self._blob = blob
        self._ahead = ahead
        self.refusal: StorageError | None = None
        """Why the file does not take the bytes."""
        self._gathered: bytearray | None = None
        self._room = ExitStack()
        self._room_for = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._room.close()

    @property
    def in_memory(self) -> bool:
        """Whether the file does not take the bytes."""
        return self._gathered is not None

    def write(self, unit: int, offset: int, data: bytes, *, whole: bool) -> None:
        """The next bytes, which begin at ``offset``; ``unit`` is the first that is not complete.

        ``whole`` says that they may be bytes of units that are present.
        """
        if self._gathered is None:
            try:
                if whole:
                    self._write_missing(unit, offset, memoryview(data))
                else:
                    self._blob.write(offset, data, ahead=self._ahead())
            except StorageError as error:
                self.refusal = error
                self._make_room(unit)
                start = self._blob.extent(unit)[0]
                self._gathered = bytearray(self._written(start, offset))
            else:
                return
        self._make_room(unit)
        self._gathered += data

    def _write_missing(self, unit: int, offset: int, view: memoryview) -> None:
        # a unit that is there may be in use: the same bytes once more could be other ones
        blob, end = self._blob, offset + len(view)
        while unit < blob.units and blob.extent(unit)[0] < end:
            start, stop = blob.extent(unit)
            start, stop = max(start, offset), min(stop, end)
            if start < stop and not blob.present[unit]:
                blob.write(start, view[start - offset : stop - offset], ahead=self._ahead())
            unit += 1

    def _written(self, offset: int, end: int) -> bytes:
        blob = self._blob
        try:
            return blob.file.read(offset, end - offset)
        except OSError as error:
            raise blob.disk.failed(error, "cannot read", blob.path) from error

    def _make_room(self, unit: int) -> None:
        if unit == self._room_for:
            return
        offset, end = self._blob.extent(unit)
        self._room.close()
        if self._blob.too_long(unit):
            raise DiskFull("the disk takes nothing, and a member is too long to be held in memory")
        self._room.enter_context(self._blob.shelf.under_way(end - offset))
        self._room_for = unit

    def arrived(self, unit: int) -> None:
        """All bytes of this unit, the first that was not complete, were written."""
        blob = self._blob
        offset, end = blob.extent(unit)
        if self._gathered is None:
            try:
                blob.mark(unit)
            except StorageError:  # all of it is in the file, but nothing will say so
                blob.hold(unit, self._written(offset, end))
            return
        with memoryview(self._gathered) as view:
            if not blob.present[unit]:
                blob.hold(unit, view[: end - offset])
        del self._gathered[: end - offset]
