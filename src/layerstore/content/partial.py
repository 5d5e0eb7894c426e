"""A file that arrives chunk by chunk: its bytes, and a bitmap of the chunks that are there.

Every chunk is verified before it is written.  The file may have changed between two processes, so
those that another process wrote are verified again, each before its first use here.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from layerstore import limits
from layerstore.content.bitmap import Bitmap
from layerstore.content.disk import Disk
from layerstore.content.files import OpenFile, open_to_fill, write_all
from layerstore.content.layermap import Chunk
from layerstore.content.room import Room

_log = logging.getLogger(__name__)

_PIECE: Final = 1 * limits.MIB


class PartialObject:
    """A file of ``chunks`` chunks that is being filled; they are named by their place in it."""

    def __init__(self, path: Path, size: int, chunks: int, disk: Disk, room: Room) -> None:
        self.path = path
        self._disk = disk
        self._room = room
        self.map_path = path.with_name(path.name + ".map")
        fd = open_to_fill(path)
        self.file = OpenFile(fd)
        if os.fstat(fd).st_size != size:
            self.map_path.unlink(missing_ok=True)  # first: no bit may outlive its bytes
            os.ftruncate(fd, size)
        self.present = Bitmap(self.map_path, chunks, disk)
        self.fresh = self.present.missing == chunks
        """Nothing is in it yet; whoever fills it says when that is not so any more."""
        self._unseen = bytearray(chunks)
        if not self.fresh:
            self._unseen[:] = (self.present[number] for number in range(chunks))

    def write(self, number: int, offset: int, data: bytes | memoryview) -> bool:
        """Store a verified chunk; True if it was the last one missing.

        Raises StorageError, DiskFull when the disk takes nothing.
        """
        self._disk.check()
        self._room.charge(len(data))
        try:
            write_all(self.file.fd, data, offset)
        except OSError as error:
            raise self._disk.failed(error, "cannot write", self.path) from error
        self._unseen[number] = False
        return self.present.set(number) and self.present.full

    def trusts(self, number: int) -> bool:
        """Whether the chunk is there and was verified in this process; never touches the disk."""
        return self.present[number] and not self._unseen[number]

    def has(self, number: int, chunk: Chunk) -> bool:
        """Whether the chunk is there, which may take a verification; forgotten if it is wrong.

        A hole is there without a bit of its own.
        """
        if not chunk.hole and not self.present[number]:
            return False
        if not self._unseen[number]:
            return True
        try:
            right = self._verify(number, chunk)
        except OSError as error:
            _log.warning("event=file-unreadable layer=%s error=%s", self.path, error.strerror)
            self.present.unset(number)
            return False
        if not right:
            _log.warning("event=object-damaged object=%s", self.path.name)
        return right or chunk.hole

    def forget_wrong(self, chunks: Iterable[Chunk]) -> int:
        """Verify all that is there, given all chunks; how many were wrong.  Raises OSError."""
        return sum(
            self.present[number] and not self._verify(number, chunk)
            for number, chunk in enumerate(chunks)
        )

    def _verify(self, number: int, chunk: Chunk) -> bool:
        """Whether a chunk that is there has the right bytes; if not, it is forgotten.

        A hole is made right at once: no member could bring it again.
        """
        if chunk.hole:
            right = self._cleared(chunk.file_offset, chunk.file_offset + chunk.size)
        else:
            data = self.file.read(chunk.file_offset, chunk.size)
            right = hashlib.sha256(data).digest() == chunk.digest
            if not right:
                self.present.unset(number)
        self._unseen[number] = False
        return right

    def _cleared(self, start: int, end: int) -> bool:
        """Make zeros of a range; whether there was nothing else."""
        right = True
        while (start := self._next_data(start)) < end:
            size = min(_PIECE, end - start)
            if any(self.file.read(start, size)):
                write_all(self.file.fd, bytes(size), start)
                right = False
            start += size
        return right

    def _next_data(self, start: int) -> int:
        try:
            return os.lseek(self.file.fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return sys.maxsize  # a hole to the end of the file
