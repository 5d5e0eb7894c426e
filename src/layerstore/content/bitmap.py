"""A bitmap in a memory-mapped file: which parts of a sparse file are there.

A bit is set only after its bytes were written.  Both live in the
page cache, so the pair survives the death of the process in the right order;
what a power failure leaves is distrusted elsewhere.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from layerstore.errors import StorageError


class Bitmap:
    """``length`` bits in the file ``path``, created zeroed if missing.

    Raises StorageError if an existing file has another length.  Thread-safe.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.length = length
        self._lock = threading.Lock()
        size = max(1, (length + 7) // 8)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                have = os.fstat(fd).st_size
                if have == 0:
                    os.ftruncate(fd, size)
                elif have != size:
                    raise StorageError(
                        f"presence map has {have} bytes instead of {size}", subject=str(path)
                    )
                self._map = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise StorageError(f"cannot map: {error.strerror}", subject=str(path)) from error
        self._missing = length - sum(byte.bit_count() for byte in self._map[:])

    def __getitem__(self, bit: int) -> bool:
        return bool(self._map[bit >> 3] >> (bit & 7) & 1)

    def set(self, bit: int) -> bool:
        """Set one bit; True if it was not set before."""
        mask = 1 << (bit & 7)
        with self._lock:
            byte = self._map[bit >> 3]
            if byte & mask:
                return False
            self._map[bit >> 3] = byte | mask
            self._missing -= 1
            return True

    def unset(self, bit: int) -> bool:
        """Clear one bit; True if it was set before."""
        mask = 1 << (bit & 7)
        with self._lock:
            byte = self._map[bit >> 3]
            if not byte & mask:
                return False
            self._map[bit >> 3] = byte & ~mask
            self._missing += 1
            return True

    @property
    def missing(self) -> int:
        """How many bits are not set."""
        return self._missing

    @property
    def full(self) -> bool:
        """True when every bit is set."""
        return self._missing == 0

    def close(self) -> None:
        """Unmap; the file stays."""
        self._map.close()
