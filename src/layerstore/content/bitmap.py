"""A bitmap in a file: which parts of a sparse file are there.

A bit is set only after its bytes were written.  Both live in the
page cache, so the pair survives the death of the process in the right order;
what a power failure leaves is distrusted by those who use it (`ObjectStore`).

The file is written, not mapped: where the disk is full, a store to a mapped page
ends the process with SIGBUS, a write only fails.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from layerstore.content.disk import Disk
from layerstore.content.files import OpenFile, open_to_fill
from layerstore.errors import StorageError


class Bitmap:
    """``length`` bits in the file ``path``, created zeroed if missing or of another length.

    Methods raise StorageError when the disk fails, DiskFull when it takes nothing; opening
    raises OSError.  Thread-safe.
    """

    def __init__(self, path: Path, length: int, disk: Disk) -> None:
        self.length = length
        self._path = path
        self._disk = disk
        self._lock = threading.Lock()
        try:
            self._open()
        except OSError:  # it cannot be read: as if it were not there
            path.unlink(missing_ok=True)
            self._open()
        self._missing = length - int.from_bytes(self._bytes).bit_count()

    def _open(self) -> None:
        size = max(1, (self.length + 7) // 8)
        self._file = OpenFile(open_to_fill(self._path))
        if os.fstat(self._file.fd).st_size != size:
            os.ftruncate(self._file.fd, 0)
            os.ftruncate(self._file.fd, size)
        self._bytes = bytearray(self._file.read(0, size))
        self._bytes[-1] &= 0xFF >> (size * 8 - self.length) % 8 if self.length else 0

    def __getitem__(self, bit: int) -> bool:
        return bool(self._bytes[bit >> 3] >> (bit & 7) & 1)

    def set(self, bit: int) -> bool:
        """Set one bit; True if it was not set before."""
        mask = 1 << (bit & 7)
        with self._lock:
            byte = self._bytes[bit >> 3]
            if byte & mask:
                return False
            self._store(bit >> 3, byte | mask)
            self._bytes[bit >> 3] = byte | mask
            self._missing -= 1
            return True

    def unset(self, bit: int) -> bool:
        """Clear one bit; True if it was set before.

        A disk that takes nothing does not keep it: whoever reads the part verifies it.
        """
        mask = 1 << (bit & 7)
        with self._lock:
            byte = self._bytes[bit >> 3]
            if not byte & mask:
                return False
            self._bytes[bit >> 3] = byte & ~mask
            self._missing += 1
            with contextlib.suppress(StorageError):
                self._store(bit >> 3, byte & ~mask)
            return True

    def _store(self, place: int, byte: int) -> None:
        try:
            os.pwrite(self._file.fd, bytes((byte,)), place)
        except OSError as error:
            raise self._disk.failed(error, "cannot write", self._path) from error

    def forget(self) -> None:
        """Clear all bits, for those who have it open: the files behind it are gone."""
        with self._lock:
            self._bytes = bytearray(len(self._bytes))
            self._missing = self.length

    @property
    def missing(self) -> int:
        """How many bits are not set."""
        return self._missing

    @property
    def full(self) -> bool:
        """True when every bit is set."""
        return self._missing == 0

    def sync(self) -> None:
        """Wait until the disk has it."""
        try:
            os.fdatasync(self._file.fd)
        except OSError as error:
            raise self._disk.failed(error, "cannot sync", self._path) from error
