"""Streams that note something while they are read."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

from layerstore import limits


class Hashed:
    """A file that is read once, and its digest."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def read(self, n: int, /) -> bytes:
        """See the file."""
        data = self._stream.read(n)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """Hex SHA-256 of the whole file."""
        while self.read(limits.MIB):
            pass
        return self._hash.hexdigest()
